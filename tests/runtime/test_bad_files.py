"""Files that must not load.

The exit code is 2, one line names the trouble, nothing is left behind, and nothing crashes.
"""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from mod_export.errors import UserError
from mod_export.runtime import MoDLlama, bindings, log
from mod_export.runtime.log import check_context
from tests.support import tiny_vocab
from tests.support.bad_gguf import MODELS, ROUTERS, set_key, set_token, tiny, write_edited
from tests.support.c_api import stock_lib
from tests.support.short_smollm2 import short_smollm2
from tests.support.tiny_gguf import Tiny

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
        result = [exc.code, sys.stdout.getvalue(), sys.stderr.getvalue()]
        print(json.dumps(result), file=sys.__stdout__, flush=True)
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


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    commands = []
    for i, (model, keys, tensors, _) in enumerate(ROUTERS.values()):
        commands.append(
            ["chat", model.write(folder / f"{i}.gguf", keys, tensors), "--prompt", "hi"]
        )
    before = set(folder.iterdir())
    answers = dict(zip(ROUTERS, run_all(commands), strict=True))
    assert set(folder.iterdir()) == before
    return answers


@pytest.mark.skipif(
    not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`"
)
@pytest.mark.parametrize("name", ROUTERS)
def test_bad_routers(results, name):
    refused(results[name], *ROUTERS[name][3])


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


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Of `chat` on each of MODELS, in one process."""
    folder = tmp_path_factory.mktemp("models")
    commands = []
    for i, (edit, _, model) in enumerate(MODELS.values()):
        path = write_edited(folder / f"{i}.gguf", edit, model=model)
        commands.append(["chat", path, "--prompt", "Hello \U0001f600"])
    return dict(zip(MODELS, run_all(commands), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_what_would_end_the_process(answers, name):
    """llama.cpp has assertions for it, which end the process, or throws where nobody catches."""
    refused(answers[name], *MODELS[name][1])


@pytest.mark.parametrize("name", ["two tokens of one text", "experts in use where there are none"])
def test_the_measuring_process_of_fit(tmp_path, run_cli, name):
    """It opens the file itself, and its end was told as a lack of memory."""
    edit, words, model = MODELS[name]
    file = write_edited(tmp_path / "bad.gguf", edit, model=model)
    done = run_cli("fit", file, "--memory", "1GB")
    refused((done.returncode, done.stdout, done.stderr), *words)


def test_zeros_over_a_token_of_smollm2(tmp_path):
    """Eight zero bytes in a token gave a failed assertion, a backtrace and the exit code 134."""
    data = bytearray(short_smollm2(tmp_path / "whole.gguf", n_layer=1).read_bytes())
    commands = []
    for text in (b"continental", b"production"[1:]):
        damaged = bytearray(data)
        start = damaged.index(text) + 1
        damaged[start : start + 8] = bytes(8)
        file = tmp_path / f"{text.decode()}.gguf"
        file.write_bytes(damaged)
        commands.append(["inspect", file])
        commands.append(["chat", file, "--prompt", "hi"])
        commands.append(["trace", file, "--prompt", "hi", "--output", tmp_path / "x.png"])
    for result in run_all(commands):
        refused(result, "of the vocabulary are both")


def test_a_context_as_long_as_the_file_says(tmp_path):
    """With n_ctx=0 the length of the file counts, and its lists must fit the memory."""
    edits = set_key("context_length", 1 << 24), set_key(".block_count", 500)
    long = write_edited(tmp_path / "long.gguf", *edits, model="bpe")
    check_context(long, 64)
    with pytest.raises(UserError, match="use a smaller context"):
        check_context(long, 0)


def test_a_lora_file_that_llama_cpp_refuses(tmp_path):
    """llama_cpp takes the null pointer for an adapter, and decoding would end the process."""
    tiny_model = tiny_vocab.BytePairs(**tiny_vocab.SIZES)
    base = tiny_model.write(tmp_path / "base.gguf")
    tiny_model.lora(tmp_path / "lora.gguf")
    data = (tmp_path / "lora.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(data[: len(data) // 2])
    for name in ("short", "missing", "base"):
        with pytest.raises(UserError, match=f"{name}.gguf"):
            MoDLlama(base, n_ctx=64, lora_path=str(tmp_path / f"{name}.gguf"))
    with closing(MoDLlama(base, n_ctx=64, lora_path=str(tmp_path / "lora.gguf"))) as llm:
        assert llm("Hello", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_tokens_that_are_not_utf8_have_a_text(tmp_path):
    file = write_edited(tmp_path / "token.gguf", set_token(300, b"a\xff"), model="bpe")
    with closing(MoDLlama(file, n_ctx=64)) as llm:
        assert llm.token_text(300) == "a\ufffd"
        assert llm.token_text(99999) == ""


def test_an_architecture_that_cannot_have_routers(tmp_path):
    """llada has llama's tensors, so only the routers are in the way."""
    model = tiny()
    model.arch = "llada"
    plain = Tiny(**{**model.__dict__, "routers": {}})
    mod, dense = model.write(tmp_path / "mod.gguf"), plain.write(tmp_path / "dense.gguf")
    bad, good = run_all([["chat", mod, "--prompt", "hi"], ["chat", dense, "--prompt", "hi"]])
    # to make the file again would not help
    refused(bad, "llada", "its attention is not causal", "use the model without routers")
    refused(good, "no chat template")


def test_an_unknown_architecture_needs_another_model(tmp_path):
    """The file is whole: to make it again would not help."""
    file = Tiny(**{**tiny().__dict__, "arch": "llama9", "routers": {}}).write(tmp_path / "x.gguf")
    with pytest.raises(UserError, match="unknown model architecture: 'llama9'; use a model of an"):
        MoDLlama(file, n_ctx=64)


@pytest.mark.parametrize(
    ("why", "cure"),
    [
        ("unable to allocate CPU buffer", "free some memory"),
        ("mmap failed: Cannot allocate memory", "free some memory"),
        ("failed to open GGUF file x.gguf", "check its permissions"),
        ("mod: key 'llama.mod.version' is 2, this build reads version 1", "use a newer mod-export"),
        ("missing tensor 'blk.0.attn_q.weight'", "get or make the file again"),
    ],
)
def test_the_cure_follows_the_reason(why, cure):
    error = log.load_error("x.gguf", 64, ValueError("Failed to load model"), [why])
    assert error.message == f"cannot load x.gguf: {why}" and error.cure.startswith(cure)


def test_a_library_that_a_variable_names(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert bindings.patched_cure() == "run `mod-export build`"
    (tmp_path / "libggml.so").touch()
    assert bindings.patched_cure().startswith(f"take {tmp_path} out of LD_LIBRARY_PATH")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "/usr/lib")
    assert bindings.patched_cure().startswith("unset LLAMA_CPP_LIB_PATH")


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
        (done.returncode, done.stdout, done.stderr),
        "wrong number of tensors",
        "unset LLAMA_CPP_LIB_PATH",
    )
