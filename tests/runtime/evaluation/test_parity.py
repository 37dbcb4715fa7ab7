"""Torch against the runtime, through the real export: `verify` on tiny models of each kind and of
combinations.
"""

import json

import pytest

from mod_export.errors import UserError
from mod_export.evaluation.parity import BOUNDS, report, verify
from mod_export.export import export
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.formats.kv_types import KVTypes
from mod_export.runtime import bindings
from tests.support import tiny_torch as tiny

pytestmark = pytest.mark.skipif(
    not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`"
)

UNITS = {
    "kv": {"kv": [2, 3, 5]},
    "attn": {"attn": [1, 4]},
    "ffn": {"ffn": [0, 4]},
    "block": {"block": [2, 3, 4]},
    "kv+attn+ffn": {"kv": [2, 3], "attn": [2, 3, 4], "ffn": [2, 4]},
    "block+kv": {"block": [1, 4], "kv": [1, 3]},
    "kv in the first layer": {"kv": [0, 2], "ffn": [1]},
    "kv of heads": {"kv": [2, 3, 5]},
    "kv of heads and block": {"kv": [1, 3], "block": [3, 4], "ffn": [0]},
    "own windows": {"kv": [1, 3], "attn": [3]},
}
# of tiny.config
OPTIONS = {
    "kv of heads": {
        "heads": 2,
        "left_out": [(3, "kv", 0)],
        "windows": {(2, "kv", 1): 3, (5, "kv", 0): 1},
    },
    "kv of heads and block": {"heads": 2},
    "own windows": {"windows": {(1, "kv"): 2}},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The f32 file without routers that all directories of seed 0 share: llama.cpp's converter
    takes seconds.
    """
    folder = tmp_path_factory.mktemp("dense")
    tiny.save_dir(folder / "mod", UNITS["kv"])
    export(folder / "mod", folder / "dense.gguf", quant="f32", dense=True)
    return folder / "dense.gguf"


@pytest.mark.parametrize("name", UNITS)
def test_f32_is_exact(tmp_path, dense, name):
    tiny.save_dir(tmp_path / "mod", UNITS[name], **OPTIONS.get(name, {}))
    export(tmp_path / "mod", tmp_path / "mod.gguf", base=dense)
    result = verify(tmp_path / "mod.gguf", tmp_path / "mod", n_tokens=400, length=200, threads=1)
    assert result["passed"], report(result)
    assert result["weights"] == "f32" and result["tokens"] == 400
    assert 0.1 < result["activation"] < 0.9
    assert result["mean_kl"] <= 1e-5 and result["max_logit_diff"] < 0.01


def test_rounded_weights_stay_within_their_bounds(tmp_path, dense):
    tiny.save_dir(tmp_path / "mod", UNITS["kv+attn+ffn"])
    export(tmp_path / "mod", tmp_path / "mod.gguf", base=dense, quant="q8_0")
    result = verify(tmp_path / "mod.gguf", tmp_path / "mod", n_tokens=400, length=200, threads=1)
    assert result["weights"] == "q8_0"
    assert 0 < result["mean_kl_all"] < BOUNDS["q8_0"].mean_kl_all
    export(tmp_path / "mod", tmp_path / "f32.gguf", base=dense)
    types = KVTypes("bf16", "f16")
    result = verify(tmp_path / "f32.gguf", tmp_path / "mod", n_tokens=200, threads=1, types=types)
    assert (result["weights"], result["kv_type"]) == ("f32", "bf16/f16")
    assert result["bounds"]["mean_kl"] == BOUNDS["f16"].mean_kl and result["max_logit_diff"] > 0.01
    assert "(f32, K/V bf16/f16) against" in report(result)
    options = {"n_tokens": 200, "threads": 1, "dtype": "bfloat16"}
    result = verify(tmp_path / "f32.gguf", tmp_path / "mod", **options)
    assert result["dtype"] == "bfloat16" and result["max_logit_diff"] > 0.01
    assert result["bounds"]["mean_kl"] == BOUNDS["q8_0"].mean_kl
    assert "in bfloat16: " in report(result)


@pytest.mark.parametrize("shape", [{"n_head_kv": 4}, {"n_head_kv": 1, "tied": True}], ids=str)
def test_shapes_through_the_converter(tmp_path, shape):
    tiny.save_dir(tmp_path / "mod", UNITS["kv+attn+ffn"], **shape)
    export(tmp_path / "mod", tmp_path / "mod.gguf", quant="f32")
    result = verify(tmp_path / "mod.gguf", tmp_path / "mod", n_tokens=200, length=200, threads=1)
    assert result["passed"], report(result)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROTARY = {
    "a scale": YARN | {"attention_factor": 1.0},
    "other betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.3 * i for i in range(8)],
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("name", ROTARY)
def test_what_the_converter_leaves_out_is_in_the_file(tmp_path, name):
    """KL was 0.11, 0.006 and 0.3 before export added what the converter has no rule for."""
    rope = {"rope_theta": 10000.0} | ROTARY[name]
    tiny.save_dir(tmp_path / "mod", UNITS["kv"], rope_parameters=rope)
    export(tmp_path / "mod", tmp_path / "mod.gguf", quant="f32")
    result = verify(tmp_path / "mod.gguf", tmp_path / "mod", n_tokens=200, length=200, threads=1)
    assert result["passed"], report(result)


def test_the_original_tells_where_both_are_wrong(tmp_path, dense, run_cli):
    """File and directory agree; an original with another rotary embedding shows in both."""
    tiny.save_dir(tmp_path / "mod", UNITS["kv"])
    file, other = tmp_path / "mod.gguf", tmp_path / "other.gguf"
    export(tmp_path / "mod", file, base=dense)
    with other.open("wb") as out:
        rewrite(GGUFFile.open(dense), out, changed_keys={"llama.rope.freq_base": 500.0})
    command = ("verify", file, "--reference", tmp_path / "mod", "--tokens", 64, "--threads", 1)
    right = run_cli(*command, "--dense", dense)
    assert right.returncode == 0 and "mean_kl of torch to the original" in right.stdout
    wrong = run_cli(*command, "--dense", other, "--json")
    result = json.loads(wrong.stdout)
    assert wrong.returncode == 1 and result["mean_kl"] <= 1e-5
    assert [line.split("'s KL to")[0].split()[-1] for line in result["failures"]] == [
        "file",
        "torch",
    ]
    refused = run_cli(*command, "--dense", file)
    assert refused.returncode == 2 and "has routers; give the file" in refused.stderr


def test_the_command_and_its_exit_codes(tmp_path, dense, run_cli):
    """0 where they agree, 1 where they do not, 2 where they cannot be compared."""
    tiny.save_dir(tmp_path / "mod", UNITS["kv"])
    tiny.save_dir(tmp_path / "other", UNITS["kv"], seed=1)
    tiny.save_dir(tmp_path / "fewer", {"kv": [2, 3]})
    file = tmp_path / "mod.gguf"
    export(tmp_path / "mod", file, base=dense)
    with pytest.raises(UserError, match="routes kv in layer 5"):
        verify(file, tmp_path / "fewer", n_tokens=64)
    # a text that is shorter is taken as it is, if it says anything
    (tmp_path / "short.txt").write_text("A lighthouse stands where the coast is dark. " * 4)
    (tmp_path / "tiny.txt").write_text("A lighthouse.")
    text = ("verify", file, "--threads", 1, "--reference", tmp_path / "mod", "--text")
    short = run_cli(*text, tmp_path / "short.txt", "--json")
    assert (
        short.returncode == 0
        and "note: 37 tokens are compared, not 1024: the text has 37" in short.stderr
    )
    assert json.loads(short.stdout)["tokens"] == 37
    none = run_cli(*text, tmp_path / "tiny.txt")
    assert none.returncode == 2 and "tokens where 16 are needed; give more text" in none.stderr
    common = ("verify", file, "--tokens", 64, "--threads", 1, "--json", "--reference")
    same, other = run_cli(*common, tmp_path / "mod"), run_cli(*common, tmp_path / "other")
    assert (same.returncode, other.returncode) == (0, 1), same.stderr + other.stderr
    result = json.loads(same.stdout)
    assert {"decision_agreement", "top1_agreement", "max_logit_diff", "mean_kl"} <= set(result)
    assert result["decision_agreement"] == 1.0
    assert json.loads(other.stdout)["failures"]
