"""The embedded SmolLM2 in torch: it speaks, its tokens are those of llama.cpp, and the adapters of
the package fit it.
"""

import copy
import random

import pytest
import torch
from llama_cpp import Llama

from mod_export.adapter import apply, base_identity, load
from mod_export.data.text import default_texts
from mod_export.formats import adapter_files, hub
from mod_export.formats.base_identity import compare, gguf_identity
from mod_export.formats.gguf import GGUFFile
from mod_export.metrics import divergence
from mod_export.model import architectures
from mod_export.model.mod_model import MoDModel


@torch.inference_mode()
def test_the_embedded_model_speaks(smollm2):
    base, tokenizer = smollm2
    assert (base.dtype, architectures.n_embd(base), len(architectures.decoder_layers(base))) == (
        torch.float32,
        576,
        30,
    )
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = MoDModel.from_base(base, tokenizer)
    answer = model.generate(ids["input_ids"], 12)
    model.detach()
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])


def test_token_ids_are_those_of_llama_cpp(smollm2):
    """transformers alone cut spaces before digits in another way: " 3" after a space became one
    piece.
    """
    tokenizer = smollm2[1]
    llama = Llama(str(hub.embedded_gguf()), vocab_only=True, verbose=False)
    rng = random.Random(1)
    pieces = [*" \n\t1½é?", "  ", "\r\n", "23", "4.5", "Hello", "n't", "日本", "😀", "<|im_start|>"]
    for _ in range(1000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 15)))
        ids = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert tokenizer.encode(text) == ids, repr(text)


def test_a_vocabulary_through_transformers_is_the_same(smollm2):
    """The vocabulary that transformers makes of the GGUF is the list in the file."""
    made = base_identity(*smollm2, "SmolLM2")
    found = gguf_identity(GGUFFile.open(hub.embedded_gguf()))
    assert made["tokenizer"] == found["tokenizer"] != ""
    assert compare(made, found) == 0


@pytest.mark.parametrize("name", adapter_files.packaged_names())
@torch.inference_mode()
def test_what_comes_with_the_package_fits_the_embedded_model(name, smollm2, caplog):
    base, tokenizer = smollm2
    ids = tokenizer(default_texts()[1], return_tensors="pt").input_ids[:, :1024]
    dense = base(ids).logits[0]
    model = apply(load(adapter_files.resolve(name)), copy.deepcopy(base), tokenizer)
    logits, trace = model(ids, trace=True)
    assert caplog.messages == []  # exactly these weights
    kl, _, _, same = (divergence(dense, logits[0], ids[0]) / (ids.shape[1] - 1)).tolist()
    assert 0 < kl < 0.1 and same > 0.85
    target = model.config.calibration["training"]["target"]
    assert trace.active.float().mean().item() == pytest.approx(target, abs=0.1)
