"""Checkpoints of models that also take images or sound: their text model is taken out."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from mod_export.errors import UserError
from mod_export.formats import hf_directory
from mod_export.model import loading
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "embed_dim": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}
LLAMA4_VISION = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
# class -> configurations of text and vision, and the class of the text model
MODELS = {
    "Gemma3ForConditionalGeneration": (TEXT, VISION, "Gemma3ForCausalLM"),
    "Gemma4ForConditionalGeneration": (
        TEXT
        | {"global_head_dim": 16, "num_kv_shared_layers": 0}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300},
        VISION | {"hidden_size": 32, "embed_dim": 32, "head_dim": 16},
        "Gemma4ForCausalLM",
    ),
    "Mistral3ForConditionalGeneration": (
        TEXT | {"model_type": "ministral3"},
        VISION,
        "Ministral3ForCausalLM",
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        TEXT | {"rope_parameters": MROPE},
        VISION,
        "Qwen2ForCausalLM",
    ),
    "Qwen3VLForConditionalGeneration": (
        TEXT | {"rope_parameters": MROPE},
        VISION,
        "Qwen3ForCausalLM",
    ),
    "Qwen3VLMoeForConditionalGeneration": (
        TEXT | EXPERTS | {"rope_parameters": MROPE},
        VISION,
        "Qwen3MoeForCausalLM",
    ),
    "Qwen3_5ForConditionalGeneration": (
        TEXT
        | {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2}
        | {"linear_num_key_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        VISION,
        "Qwen3_5ForCausalLM",
    ),
    "Llama4ForConditionalGeneration": (
        TEXT | {"intermediate_size_mlp": 48, "num_local_experts": 2},
        VISION | LLAMA4_VISION,
        "Llama4ForCausalLM",
    ),
    "InternVLForConditionalGeneration": (TEXT, VISION, "Qwen2ForCausalLM"),
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def save(path, name, tied, **more):
    """Save a tiny random model of a class with its tokenizer, and return the model."""
    text, vision, _ = MODELS[name]
    found = getattr(transformers, name)
    if found.config_class.sub_configs["vision_config"].__name__ == "AutoConfig":
        vision = {"model_type": found.config_class().vision_config.model_type, **vision}
    torch.manual_seed(0)
    whole = {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied, **more}
    model = found(found.config_class(**whole)).eval()
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    (path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_the_text_model_has_the_logits_of_the_whole_model(tmp_path, name, tied):
    whole = save(tmp_path / "whole", name, tied, eos_token_id=[7, 9])
    text, tokenizer = loading.load(tmp_path / "whole")
    assert type(text).__name__ == MODELS[name][2]
    ids = torch.randint(10, 300, (1, 24), generator=torch.Generator().manual_seed(1))
    expected = whole(ids).logits
    assert torch.equal(text(ids).logits, expected)
    assert tokenizer.chat_template == TEMPLATE
    # What is saved is an ordinary directory of the same model.
    text.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    again, tokenizer = loading.load(tmp_path / "text")
    assert torch.equal(again(ids).logits, expected)
    assert tokenizer.chat_template == TEMPLATE
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert config["architectures"] == [MODELS[name][2]]
    assert config["eos_token_id"] == [7, 9]


def test_layers_for_drafts_come_along_with_the_text_model(tmp_path):
    """Released checkpoints of Qwen3.5 have them beside a model that takes images."""
    save(tmp_path / "whole", "Qwen3_5ForConditionalGeneration", tied=False)
    file = tmp_path / "whole" / "model.safetensors"
    head = {"mtp.fc.weight": torch.rand(32, 64), "mtp.layers.0.mlp.up_proj.weight": torch.rand(4)}
    save_file(load_file(file) | head, file, metadata={"format": "pt"})
    text, tokenizer = loading.load(tmp_path / "whole")
    routed = tiny.config({"kv": [1]}, n_layer=2)
    tiny.wrap(text, routed, tokenizer=tokenizer).save(tmp_path / "mod")
    index = hf_directory.tensor_index(hf_directory.tensor_files(tmp_path / "mod"))
    for name, value in head.items():
        assert torch.equal(load_file(index[name])[name], value)
    assert not any("visual" in name for name in index)


def test_models_without_a_causal_text_model_are_refused(tmp_path):
    cases = {
        "t5": ("T5ForConditionalGeneration", "encoder with a decoder"),
        "glm4v": ("Glm4vForConditionalGeneration", "no class for text alone of glm4v"),
        "paligemma": ("PaliGemmaForConditionalGeneration", "in both directions"),
        "llama": ("NewVLForConditionalGeneration", "transformers does not know NewVL"),
    }
    for model_type, (name, message) in cases.items():
        CONFIG_MAPPING[model_type](architectures=[name]).save_pretrained(tmp_path / model_type)
        byte_tokenizer().save_pretrained(tmp_path / model_type)
        with pytest.raises(UserError, match=message) as error:
            loading.load(tmp_path / model_type)
        assert "\n" not in str(error.value)
