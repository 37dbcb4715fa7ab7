"""Files that must not load: exit code 2, one line that names the trouble, nothing left behind,
never a crash.
"""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from mod_export.runtime import bindings
from tests.support.c_api import stock_lib
from tests.support.tiny_gguf import Tiny

V = gguf.GGUFValueType
NAN = float("nan")

# runs `mod-export` on each line of stdin in one process, so that a crash shows in the process's own
# exit code
RUNNER = """
import io, json, sys
from mod_export.cli import main
for line in sys.stdin:
    sys.stderr, sys.stdout = io.StringIO(), io.StringIO()
    try:
        main(json.loads(line))
    except SystemExit as exc:
        print(json.dumps([exc.code, sys.stdout.getvalue(), sys.stderr.getvalue()]), file=sys.__stdout__, flush=True)
"""


def run_all(commands: list[list]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each command line."""
    lines = "\n".join(json.dumps([str(a) for a in c]) for c in commands)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=lines,
        capture_output=True,
        text=True,
        cwd=root,
        timeout=300,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"crashed on {commands[len(results)]}: {done.stderr[-2000:]}"
    assert done.stderr == ""  # nor does llama.cpp print anything itself
    return [tuple(r) for r in results]


def refused(result, *words) -> None:
    code, out, err = result
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert out == ""
    for word in words:
        assert word in err, err


def tiny(kinds: str = "kv", layers=(1, 3)) -> Tiny:
    return Tiny(n_layer=4, n_embd=64, n_head=2, n_head_kv=1, n_ff=64, n_vocab=32).route(
        layers, kinds
    )


def router(value=None, layer: int = 3, kind: str = "kv", part: str = "weight") -> dict:
    return {f"blk.{layer}.mod_{kind}.{part}": value}


def with_nan(n: int, value: float = NAN) -> np.ndarray:
    x = np.zeros(n, np.float32)
    x[n // 2] = value
    return x


def threshold(*p: float, kind: str = "kv") -> dict:
    return {f"{kind}.threshold": ([float(x) for x in p], V.ARRAY, V.FLOAT32)}


# name -> (model, keys and tensors that replace the right ones, words of the message)
BAD = {
    "router weight missing": (tiny(), {}, router(), ["blk.3.mod_kv.weight"]),
    "router bias missing": (tiny(), {}, router(part="bias"), ["blk.3.mod_kv.bias"]),
    "router too short": (
        tiny(),
        {},
        router(np.zeros(63, np.float32)),
        ["blk.3.mod_kv.weight", "shape"],
    ),
    "router a matrix": (
        tiny(),
        {},
        router(np.zeros((64, 64), np.float32)),
        ["blk.3.mod_kv.weight", "shape"],
    ),
    "bias of two": (
        tiny(),
        {},
        router(np.zeros(2, np.float32), part="bias"),
        ["blk.3.mod_kv.bias", "shape"],
    ),
    "router in f16": (
        tiny(),
        {},
        router(np.zeros(64, np.float16)),
        ["blk.3.mod_kv.weight", "type"],
    ),
    "router NaN": (tiny(), {}, router(with_nan(64)), ["blk.3.mod_kv.weight", "finite"]),
    "router infinite": (
        tiny(),
        {},
        router(with_nan(64, np.inf)),
        ["blk.3.mod_kv.weight", "finite"],
    ),
    "bias NaN": (tiny(), {}, router(with_nan(1), part="bias"), ["blk.3.mod_kv.bias", "finite"]),
    "router without a threshold": (tiny(), threshold(0, 0.5, 0, 0), {}, ["blk.3.mod_kv"]),
    "router in a layer that is not there": (
        tiny(),
        {},
        router(np.zeros(64, np.float32), layer=9),
        ["blk.9.mod_kv"],
    ),
    "threshold without a router": (
        tiny(),
        threshold(0, 0.5, 0.5, 0.5),
        {},
        ["blk.2.mod_kv.weight"],
    ),
    "threshold 1": (tiny(), threshold(0, 0.5, 0, 1), {}, ["llama.mod.kv.threshold"]),
    "threshold negative": (tiny(), threshold(0, 0.5, 0, -0.5), {}, ["llama.mod.kv.threshold"]),
    "threshold NaN": (tiny(), threshold(0, 0.5, 0, NAN), {}, ["llama.mod.kv.threshold"]),
    "threshold list short": (tiny(), threshold(0, 0.5, 0.5), {}, ["llama.mod.kv.threshold"]),
    "threshold of integers": (
        tiny(),
        {"kv.threshold": ([0, 1, 0, 1], V.ARRAY, V.INT32)},
        {},
        ["kv.threshold", "type"],
    ),
    "threshold a number": (
        tiny(),
        {"kv.threshold": (0.5, V.FLOAT32, None)},
        {},
        ["kv.threshold", "type"],
    ),
    "threshold key missing": (tiny(), {"kv.threshold": (None,) * 3}, {}, ["llama.mod."]),
    "activation missing": (tiny(), {"kv.activation": (None,) * 3}, {}, ["llama.mod.kv.activation"]),
    "activation above 1": (
        tiny(),
        {"kv.activation": ([1.0, 2.0, 1.0, 1.0], V.ARRAY, V.FLOAT32)},
        {},
        ["activation"],
    ),
    "block beside attn": (tiny("block+attn"), {}, {}, ["layer 1", "block", "attn"]),
    "block beside ffn": (tiny("block+ffn"), {}, {}, ["layer 1", "block", "ffn"]),
    "no complete layer": (tiny("kv", (0, 1, 2, 3)), {}, {}, ["complete K/V"]),
    "kv_window 0": (tiny(), {"kv_window": (0, V.UINT32, None)}, {}, ["llama.mod.kv_window"]),
    "kv_window missing": (tiny(), {"kv_window": (None,) * 3}, {}, ["llama.mod.kv_window"]),
    "version 2": (tiny(), {"version": (2, V.UINT32, None)}, {}, ["llama.mod.version", "2"]),
    "version missing": (tiny(), {"version": (None,) * 3}, {}, ["mod"]),
    "version a string": (tiny(), {"version": ("1", V.STRING, None)}, {}, ["llama.mod.version"]),
    "gating function": (
        tiny(),
        {"gating_func": ("softmax", V.STRING, None)},
        {},
        ["llama.mod.gating_func", "softmax"],
    ),
    "sink_tokens missing": (tiny(), {"sink_tokens": (None,) * 3}, {}, ["llama.mod.sink_tokens"]),
    "scale_output missing": (tiny(), {"scale_output": (None,) * 3}, {}, ["llama.mod.scale_output"]),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    commands = []
    for i, (model, keys, tensors, _) in enumerate(BAD.values()):
        commands.append(
            ["chat", model.write(folder / f"{i}.gguf", keys, tensors), "--prompt", "hi"]
        )
    before = set(folder.iterdir())
    answers = dict(zip(BAD, run_all(commands), strict=True))
    assert set(folder.iterdir()) == before
    return answers


@pytest.mark.skipif(
    not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`"
)
@pytest.mark.parametrize("name", BAD)
def test_bad_routers(results, name):
    refused(results[name], *BAD[name][3])


@pytest.mark.skipif(
    not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`"
)
def test_the_right_files_load(tmp_path):
    """They end with another error: chat needs a template."""
    commands = []
    for i, kinds in enumerate(("kv", "block", "attn+ffn+kv")):
        commands.append(["chat", tiny(kinds).write(tmp_path / f"{i}.gguf"), "--prompt", "hi"])
    for result in run_all(commands):
        refused(result, "no chat template")


def test_an_architecture_that_is_not_mod_aware(tmp_path):
    """internlm2 has llama's tensors, so only the routers are in the way."""
    model = tiny()
    model.arch = "internlm2"
    plain = Tiny(**{**model.__dict__, "routers": {}})
    mod, dense = model.write(tmp_path / "mod.gguf"), plain.write(tmp_path / "dense.gguf")
    bad, good = run_all([["chat", mod, "--prompt", "hi"], ["chat", dense, "--prompt", "hi"]])
    refused(bad, "internlm2" if bindings.patched() else "wrong number of tensors")
    refused(good, "no chat template")


def test_truncated_at_any_offset(tmp_path):
    data = tiny("attn+ffn+kv").write(tmp_path / "whole.gguf").read_bytes()
    rng = np.random.default_rng(5)
    offsets = [
        0,
        3,
        4,
        8,
        23,
        24,
        len(data) // 2,
        len(data) - 1,
        *rng.integers(0, len(data), 20).tolist(),
    ]
    commands = []
    for n in offsets:
        (tmp_path / f"{n}.gguf").write_bytes(data[:n])
        commands.append(["chat", tmp_path / f"{n}.gguf", "--prompt", "hi"])
    for n, result in zip(offsets, run_all(commands), strict=True):
        refused(result, f"{n}.gguf")


def test_no_gguf_at_all(tmp_path):
    (tmp_path / "text.gguf").write_text("once upon a time")
    (tmp_path / "folder").mkdir()
    cases = {"none.gguf": "does not exist", "text.gguf": "not a GGUF", "folder": "not a file"}
    commands = [
        [*c, tmp_path / name]
        for name in cases
        for c in (["chat", "--prompt", "hi"], ["trace", "--prompt", "hi", "-o", tmp_path / "x.png"])
    ]
    for command, result in zip(commands, run_all(commands), strict=True):
        refused(result, *(words for name, words in cases.items() if name == command[-1].name))
    assert not (tmp_path / "x.png").exists()


def test_a_mod_file_on_a_stock_llama_cpp(tmp_path, run_cli):
    """Stock llama.cpp counts tensors it does not know, and refuses."""
    file = tiny().write(tmp_path / "mod.gguf")
    done = run_cli(
        "chat", file, "--prompt", "hi", LLAMA_CPP_LIB_PATH=str(stock_lib()), LD_LIBRARY_PATH=""
    )
    refused(
        (done.returncode, done.stdout, done.stderr), "wrong number of tensors", "mod-export build"
    )
