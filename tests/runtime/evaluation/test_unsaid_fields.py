"""Fields of a configuration that llama.cpp's converter leaves out: told to the file, or refused.

A tiny random model of each type had every field changed, one at a time, and torch's logits compared
with the runtime's. These are the kinds of fields that once made another model in silence, with a KL
of 1e-3 to 1. One process of llama.cpp's converter writes all files.
"""

import re

import pytest

from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile
from mod_export.metrics import compare_rows
from mod_export.model.gguf_account import account, check_base
from mod_export.runtime.opening import check_opens
from tests.runtime.evaluation.test_model_types import MAX_KL, runtime_logits, torch_logits
from tests.support.gguf_models import random_model, write_models
from tests.support.model_types import FULL, MODEL_TYPES, SLIDING

THETA = {"rope_theta": 10000.0}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
BETAS = YARN | {"beta_fast": 8.0, "beta_slow": 2.0}
LLAMA3 = THETA | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OTHER_THETA = {"rope_type": "default", "rope_theta": 3000.0}
LINEAR = THETA | {"rope_type": "linear", "factor": 3.0}
NO_KEYS = "has no keys"
ALL_OF_WINDOW = "layer {} of .* attends to all tokens, where .* 32"


def rope(parameters: dict) -> dict:
    return {"rope_parameters": parameters}


def rope_of_layers(full: dict, sliding: dict) -> dict:
    return rope({FULL: full, SLIDING: sliding})


# model type -> changed fields and what the line says
REFUSED = [
    ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64, where llama.cpp .* 32"),
    ("gemma3_text", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("gemma3_text", {"hidden_activation": "silu"}, "computes gelu_pytorch_tanh"),
    ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act 'gelu', where llama.cpp computes silu"),
    ("falcon", {"activation": "relu"}, "activation 'relu'"),
    ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob True, where llama.cpp computes False"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
    ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob True"),
    ("olmoe", {"clip_qkv": 0.5}, "clip_qkv 0.5"),
    ("olmoe", {"rms_norm_eps": 0.01}, "rms_norm_eps 0.01, and .* 1e-05"),
    ("gpt_oss", {"swiglu_alpha": 2.5}, "swiglu_alpha 2.5, where llama.cpp computes 1.702"),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers"),
    ("exaone4", {"sliding_window": 32}, "sliding_window 32, where llama.cpp computes None"),
    (
        "cohere2",
        {"layer_types": [SLIDING, FULL] * 2},
        ALL_OF_WINDOW.format(1),
    ),
    (
        "gpt_oss",
        {"layer_types": [FULL, SLIDING] * 2},
        ALL_OF_WINDOW.format(0),
    ),
    (
        "gemma3_text",
        {"layer_types": [SLIDING, FULL] * 3},
        ALL_OF_WINDOW.format(1),
    ),
    ("qwen3_5", {"linear_value_head_dim": 16}, "linear_value_head_dim 16, where .* 32"),
    ("qwen3_next", {"norm_topk_prob": False}, "norm_topk_prob False"),
    ("lfm2_moe", {"routed_scaling_factor": 2.0}, "routed_scaling_factor 2.0, where .* 1.0"),
    ("granitemoehybrid", {"position_embedding_type": "rope"}, "position_embedding_type 'rope'"),
    ("granitemoehybrid", {"time_step_limit": [0.01, 0.1]}, r"time_step_limit \[0.01, 0.1\]"),
    ("falcon_h1", {"tie_word_embeddings": True}, "tie_word_embeddings True"),
    ("falcon_h1", {"attention_bias": True}, "attention_bias True"),
    ("falcon_h1", {"mamba_rms_norm": True}, "mamba_norm_before_gate True"),
    ("falcon_h1", rope(LLAMA3), NO_KEYS),
    ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu', where .* relu2"),
    ("qwen3_moe", rope(LLAMA3), NO_KEYS),
    ("seed_oss", rope(BETAS), NO_KEYS),
    ("ernie4_5", rope(YARN | {"truncate": False}), NO_KEYS),
    ("gpt_oss", rope(BETAS | {"truncate": False}), NO_KEYS),
    ("gemma", rope(OTHER_THETA), NO_KEYS),
    ("phi", rope(LINEAR), NO_KEYS),
    ("stablelm", rope(OTHER_THETA), NO_KEYS),
    ("falcon", rope(OTHER_THETA), NO_KEYS),
    ("nemotron", rope(YARN), NO_KEYS),
    ("cohere", rope(LINEAR), NO_KEYS),
    ("olmo3", rope_of_layers(OTHER_THETA, {"rope_type": "default", **THETA}), NO_KEYS),
    ("gemma3_text", rope_of_layers(LLAMA3, {"rope_type": "default", **THETA}), NO_KEYS),
    ("gemma3_text", rope_of_layers(LINEAR, LINEAR), NO_KEYS),
]
# model type -> changed fields that keys or tensors can still say
COMPLETED = [
    ("gpt_oss", rope(YARN | {"attention_factor": 1.3})),
    ("qwen3_moe", rope(YARN | {"attention_factor": 1.3})),
    ("exaone4", rope(BETAS)),
    ("arcee", rope(YARN | {"truncate": False})),
    ("granite", rope(BETAS)),
    ("apertus", rope(BETAS)),
    ("deepseek_v3", {"scoring_func": None}),
]
# Fields that shorten the context of the file, where one line tells it.
WINDOWS = [("phi3", {"sliding_window": 32}), ("ministral3", {"sliding_window": 32})]
# Weights that llama.cpp has no place for, or lacks.
UNOPENED = [
    ("qwen3", {"attention_bias": True}, "wrong number of tensors"),
    ("olmo2", {"tie_word_embeddings": True}, "output.weight"),
]
ROUNDED = ("gpt_oss", rope(YARN | {"truncate": False}))


def changed(case) -> tuple:
    model_type, fields = MODEL_TYPES[case[0]]
    return model_type, fields | case[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(directory, file) of each case, by the number of the case in the lists above."""
    cases = {
        f"{group}{number}": changed(case)
        for group, listed in GROUPS.items()
        for number, case in enumerate(listed)
    }
    written = write_models(tmp_path_factory.mktemp("fields"), cases)
    return {name: (path.with_suffix(""), GGUFFile.open(path)) for name, path in written.items()}


GROUPS = {
    "refused": REFUSED,
    "completed": COMPLETED,
    "windows": WINDOWS,
    "rounded": [ROUNDED],
    "unopened": UNOPENED,
}


def names(listed) -> list[str]:
    return [f"{case[0]}-{'-'.join(case[1])}-{number}" for number, case in enumerate(listed)]


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=names(REFUSED))
def test_what_no_key_says_is_refused(files, number):
    directory, file = files[f"refused{number}"]
    with pytest.raises(UserError) as error:
        account(directory, file)
    assert re.search(REFUSED[number][2], error.value.message), error.value.message


@pytest.mark.parametrize("number", range(len(COMPLETED)), ids=names(COMPLETED))
def test_what_a_key_can_say_is_in_the_file(files, tmp_path, number):
    directory, file = files[f"completed{number}"]
    added = account(directory, file)
    assert added
    with pytest.raises(UserError):
        check_base(directory, file)
    whole = tmp_path / "whole.gguf"
    added.write(file, whole)
    check_base(directory, GGUFFile.open(whole))
    expected = torch_logits(random_model(*changed(COMPLETED[number])))
    assert compare_rows(expected, runtime_logits(whole))[:, 0].mean() <= MAX_KL


@pytest.mark.parametrize("number", range(len(WINDOWS)), ids=names(WINDOWS))
def test_a_window_that_llama_lacks_shortens_the_context(files, number):
    directory, file = files[f"windows{number}"]
    assert account(directory, file).keys == [(f"{file.architecture}.context_length", "u32", 32)]


def test_yarn_that_llama_rounds_is_told(files, caplog):
    """gpt-oss-20b is released so. No file of it can say that llama.cpp shall not round."""
    directory, file = files["rounded0"]
    assert not account(directory, file)
    (line,) = caplog.messages
    assert "truncate False" in line and "llama.cpp rounds the bounds of YaRN" in line
    kl = compare_rows(torch_logits(random_model(*changed(ROUNDED))), runtime_logits(file.path))
    assert MAX_KL < kl[:, 0].mean() < 0.1


@pytest.mark.parametrize("number", range(len(UNOPENED)), ids=names(UNOPENED))
def test_what_llama_does_not_open_is_no_result(files, number):
    _, file = files[f"unopened{number}"]
    with pytest.raises(
        UserError, match=f"llama.cpp does not open .*{UNOPENED[number][2]}.*; torch"
    ):
        check_opens(file.path, "torch")
    _, file = files["rounded0"]
    check_opens(file.path, "torch")
