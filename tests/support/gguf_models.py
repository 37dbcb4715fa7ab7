"""Tiny random models of many architectures as GGUF files, by llama.cpp's own converter.

    files = write_models(folder, MODELS)     # {"linear": folder / "linear.gguf", ...}

The files hold f32, and a vocabulary of a token per byte. One process converts all of them.
"""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.llamacpp import source
from tests.support.byte_tokenizer import byte_tokenizer

N_VOCAB = 261  # a token per byte, one merge, and four that architectures look up by name
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": N_VOCAB,
    "bos_token_id": 258,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "initializer_range": 0.12,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _rope(kind: str, **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


# name -> model_type and fields of its configuration
MODELS = {
    "untied": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "attention_bias": ("llama", {"attention_bias": True}),
    "mlp_bias": ("llama", {"mlp_bias": True}),
    "rope_freqs": (
        "llama",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=256,
        ),
    ),
    "linear": ("llama", _rope("linear", factor=4.0)),
    "yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=512)),
    "qwen3moe": ("qwen3_moe", _MIXTURE | {"head_dim": 32, "norm_topk_prob": True}),
    "phi": (
        "phi3",
        {"original_max_position_embeddings": 512}
        | _rope(
            "longrope",
            short_factor=[1 + i / 10 for i in range(8)],
            long_factor=[2.0 + i for i in range(8)],
            original_max_position_embeddings=512,
        ),
    ),
    "softcaps": (
        "gemma2",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": _rope("linear", factor=4.0)["rope_parameters"],
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ),
}

# Runs in the source directory of llama.cpp. The converter knows vocabularies by the hash of what
# they give for a text, so that a made-up one has to be written by hand.
_SCRIPT = """
import importlib, json, pkgutil, runpy, sys
from pathlib import Path
sys.path.insert(0, ".")
import conversion
from mod_export.llamacpp.converter import FIELDS_SCRIPT
exec(FIELDS_SCRIPT)
from conversion.base import TextModel

tokens = json.loads(sys.argv[1])

def set_vocab(self):
    self.gguf_writer.add_tokenizer_model("gpt2")
    self.gguf_writer.add_tokenizer_pre("gpt-2")
    self.gguf_writer.add_token_list(tokens)
    self.gguf_writer.add_token_types([1] * (len(tokens) - 4) + [3] * 4)
    self.gguf_writer.add_token_merges(["~ ~"])
    self.gguf_writer.add_eos_token_id(len(tokens) - 4)

def patch(kind):
    kind.set_vocab = set_vocab
    for child in kind.__subclasses__():
        patch(child)

for module in pkgutil.iter_modules(conversion.__path__):
    importlib.import_module("conversion." + module.name)
patch(TextModel)
for folder in map(Path, sys.argv[2:]):
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": tokens}, "added_tokens": []})
    )
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", f"{folder}.gguf",
                "--outtype", "f32", "--model-name", "tiny"]
    runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""


def write_models(folder: Path, models: dict) -> dict[str, Path]:
    """Write a GGUF file of each model, and return the paths by the models' names."""
    import json

    folders = {name: folder / name for name in models}
    for name, (model_type, fields) in models.items():
        random_model(model_type, fields).save_pretrained(folders[name])
    vocab = byte_tokenizer().get_vocab()
    special = ["<|endoftext|>", "<s>", "</s>", "<unk>"]
    tokens = [*sorted(vocab, key=vocab.__getitem__), "~~", *special]
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(tokens), *map(str, folders.values())],
        cwd=source.source_dir() / source.LLAMA_CPP,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return {name: Path(f"{path}.gguf") for name, path in folders.items()}


def random_model(model_type: str, fields: dict):
    """Return a random model whose biases and norms matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SMALL | fields))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith(("layer_scalar", "e_score_correction_bias", "expert_bias")):
                buffer += 0.2 * torch.rand_like(buffer)
    return model.eval()


def changed(source_path: Path, target: Path, **changes) -> Path:
    """Write the file again with changes: those of formats.gguf.rewrite."""
    with target.open("wb") as file:
        rewrite(GGUFFile.open(source_path), file, **changes)
    return target
