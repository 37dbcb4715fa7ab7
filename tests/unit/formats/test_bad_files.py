"""GGUF files that are cut off or damaged anywhere give a report or a UserError.

No other exception is raised. What the runtime refuses is refused here as well.
"""

import random

import pytest

from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile
from mod_export.inspection import inspect, render
from tests.support import bad_gguf
from tests.support.tiny_gguf import Tiny


@pytest.fixture(scope="module")
def mod_file(tmp_path_factory):
    tiny = Tiny(n_layer=6, n_embd=64, n_head=2, n_ff=64)
    return tiny.route([2, 3], "kv+ffn").write(tmp_path_factory.mktemp("file") / "mod.gguf")


def test_truncated_at_random_places(mod_file, tmp_path):
    data = mod_file.read_bytes()
    short = tmp_path / "short.gguf"
    rng = random.Random(0)
    header = GGUFFile.open(mod_file).data_start
    ends = [rng.randrange(4, header) for _ in range(10)] + [
        rng.randrange(header, len(data) - 64) for _ in range(10)
    ]
    for end in ends:
        short.write_bytes(data[:end])
        with pytest.raises(UserError, match="truncated|damaged"):
            inspect(short)


def test_damaged_at_random_places(tmp_path):
    """Any byte of the header may be wrong: a report or a UserError, never another exception."""
    bad_gguf.write(tmp_path / "good.gguf")
    data = (tmp_path / "good.gguf").read_bytes()
    rng = random.Random(1)
    refused = 0
    header = GGUFFile.open(tmp_path / "good.gguf").data_start
    for _ in range(400):
        damaged = bytearray(data)
        for place in rng.sample(range(4, header), 2):
            damaged[place] = rng.randrange(256)
        (tmp_path / "bad.gguf").write_bytes(damaged)
        try:
            render(inspect(tmp_path / "bad.gguf"))
        except UserError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("name", bad_gguf.ROUTERS)
def test_what_the_runtime_refuses(tmp_path, name):
    """tests/runtime/test_bad_files.py gives the same files to llama.cpp."""
    model, keys, tensors, _ = bad_gguf.ROUTERS[name]
    path = model.write(tmp_path / "bad.gguf", keys, tensors)
    with pytest.raises(UserError) as error:
        inspect(path)
    assert "\n" not in str(error.value)


def test_no_gguf_at_all(tmp_path):
    (tmp_path / "text.gguf").write_text("once upon a time")
    (tmp_path / "empty.gguf").write_text("")
    cases = {
        "none.gguf": "no such file",
        "text.gguf": "is not a GGUF file",
        "empty.gguf": "is not a GGUF file",
        ".": "is a directory",
    }
    for name, words in cases.items():
        with pytest.raises(UserError, match=words):
            inspect(tmp_path / name)
