"""The report of a GGUF file."""

import json
import math
import re

import pytest

from mod_export import inspection
from mod_export.export import export, read_directory
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.formats.kv_size import ROLLBACK_TOKENS
from mod_export.inspection import inspect, render
from tests.support.mod_files import write_directory
from tests.support.tiny_gguf import Tiny

UNITS = {"kv": [2, 3], "attn": [3], "ffn": [4]}


@pytest.fixture(scope="module")
def mod_dir(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("model") / "mod", UNITS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    tiny = Tiny(n_layer=6, n_embd=64, n_head=4, n_head_kv=2, n_ff=64)
    return tiny.write(tmp_path_factory.mktemp("base") / "base.gguf")


@pytest.fixture(scope="module")
def mod_file(tmp_path_factory, mod_dir, base):
    path = tmp_path_factory.mktemp("out") / "mod.gguf"
    export(mod_dir, path, base=base)
    return path


def test_inspect_tells_what_export_wrote(mod_file, mod_dir):
    config, _ = read_directory(mod_dir)
    report = inspect(mod_file)
    assert [(unit["layer"], unit["kind"]) for unit in report["mod"]["units"]] == config.routed()
    assert report["mod"]["activation"] == {"kv": 0.5, "attn": 0.5, "ffn": 0.5, "all": 0.5}
    assert json.loads(json.dumps(report)) == report
    assert "4 routed units" in render(report)


def test_expected_kv(mod_file):
    kv = inspect(mod_file)["mod"]["kv"]
    per_layer = 2 * 2 * 16 * 2  # K and V, 2 heads of 16 values, f16
    assert kv["bytes_per_token_dense"] == 6 * per_layer
    [first, *_] = kv["expected"]
    window = 8 + ROLLBACK_TOKENS
    kept = window + 0.5 * (1000 - window)
    # layer 2: kv; layer 3: kv and attn; the other four are complete
    assert first["bytes_mod"] == round(per_layer * (4 * 1000 + kept + 0.5 * kept))
    assert math.isclose(first["share"], first["bytes_mod"] / (6000 * per_layer))


def test_units_of_heads(tmp_path, base):
    """Layer 2 has two of them, layer 3 the second head; one has a window of its own."""
    options = {"heads": 2, "windows": {(2, "kv", 0): 2}}
    export(write_directory(tmp_path / "mod", UNITS, **options), tmp_path / "mod.gguf", base=base)
    report = inspect(tmp_path / "mod.gguf")
    units = [unit for unit in report["mod"]["units"] if unit["kind"] == "kv"]
    assert [(unit["layer"], unit["head"], unit["window"]) for unit in units] == [
        (2, 0, 2),
        (2, 1, 8),
        (3, 1, 8),
    ]
    [first, *_] = report["mod"]["kv"]["expected"]
    per_head = 2 * 16 * 2
    narrow, wide = (w + ROLLBACK_TOKENS + 0.5 * (1000 - w - ROLLBACK_TOKENS) for w in (2, 8))
    # layer 3 has attn too
    cells = 4 * 2 * 1000 + narrow + wide + 0.5 * (1000 + wide)
    assert first["bytes_mod"] == round(per_head * cells)
    lines = [line.split() for line in render(report).splitlines()]
    assert "layer unit heads threshold activation window".split() in lines
    assert "2 kv 0 1 0.5000 0.500 2 8".split() in lines
    assert "3 kv 1 0.5000 0.500 8".split() in lines
    assert "3 attn - 0.5000 0.500 -".split() in lines
    assert "Mixture-of-Depths schema 2: 5 routed units" in render(report)


def test_ffn_units_leave_the_kv_as_it_is(tmp_path):
    text = render(inspect(Tiny(n_layer=4).route([2, 3], "ffn").write(tmp_path / "mod.gguf")))
    assert "kv window" not in text and "cells(n)" not in text
    assert "bytes per token when dense, and as many here" in text


def test_a_table_of_many_heads_is_short():
    """One line for each layer: the heads' range, or the one value that they share."""
    units = [
        {"layer": layer, "kind": "kv", "head": head, "threshold": 0.5, "activation": head / 100}
        for layer in range(1, 30)
        for head in range(16)
    ]
    lines = inspection._render_units(units).splitlines()
    assert len(lines) == 2 + 29 and max(map(len, lines)) < 60
    assert lines[2].split() == "1 kv 0-15 0.5000 0.000 to 0.150".split()


def test_expected_kv_of_sliding_layers(tmp_path):
    """Of a gemma3 every sixth layer is a full one."""
    tiny = Tiny(n_layer=6, n_embd=64, n_head=4, n_head_kv=2, n_ff=64, arch="gemma3")
    plain = tiny.route([3], "attn").route([5], "kv").write(tmp_path / "plain.gguf")
    path = tmp_path / "mod.gguf"
    with path.open("wb") as file:
        window = ("gemma3.attention.sliding_window", "u32", 100)
        rewrite(GGUFFile.open(plain), file, added_keys=[window])
    report = inspect(path)
    kv, per_layer = report["mod"]["kv"], 2 * 2 * 16 * 2
    assert kv["windows"] == [100] * 5 + [0] and kv["note"] is None
    *_, last = kv["expected"]
    assert last["bytes_dense"] == per_layer * (5 * 768 + 16000)
    kept = 8 + ROLLBACK_TOKENS
    of_full = kept + 0.5 * (16000 - kept)
    assert last["bytes_mod"] == round(per_layer * ((4 + 0.5) * (100 + ROLLBACK_TOKENS) + of_full))
    assert "5 of 6 layers keep a window of 100 tokens" in render(report)


def test_a_window_that_is_larger_than_the_context(tmp_path, mod_dir, caplog):
    """2 first tokens, a window of 8 and a margin of 64."""
    for n_ctx, told in ((74, True), (75, False)):
        tiny = Tiny(n_layer=6, n_embd=64, n_head=4, n_head_kv=2, n_ff=64, n_ctx=n_ctx)
        path = tmp_path / f"mod-{n_ctx}.gguf"
        caplog.clear()
        export(mod_dir, path, base=tiny.write(tmp_path / f"{n_ctx}.gguf"))
        note = f"free nothing within the model's context of {n_ctx} tokens, because they keep 74"
        assert (note in caplog.text, note in render(inspect(path))) == (told, told)


def test_inspect_a_dense_file(base):
    report = inspect(base)
    assert report["mod"] is None and "dense" in render(report)
    assert "it can have units of kind kv, block, attn, ffn in all layers" in render(report)


def test_inspect_a_dense_hybrid(tmp_path):
    """Which layers attend is in no other output; Falcon-H1's have a state too."""
    for arch, told in (
        ("qwen35", "kv, block, attn in layers 3, 7; ffn in all layers"),
        ("falcon-h1", "kv, ffn in all layers (it has a recurrent state beside its attention, "),
    ):
        tiny = Tiny(n_layer=8, n_embd=64, n_head=2, n_ff=64, arch=arch)
        report = render(inspect(tiny.write(tmp_path / f"{arch}.gguf")))
        assert f"it can have units of kind {told}" in report


def test_inspect_a_file_whose_architecture_is_refused(tmp_path):
    tiny = Tiny(n_layer=2, n_embd=64, n_head=2, n_ff=64, arch="llada")
    report = inspect(tiny.write(tmp_path / "llada.gguf"))
    assert report["possible_units"] == {}
    assert "it cannot have routers: " in render(report)


def test_inspect_a_file_that_the_runtime_refuses(tmp_path):
    slides = "layer 1 of .* cannot have a kv unit: it attends to a sliding window of 12 tokens"
    for shape, layer, told in (
        ({"arch": "llada"}, 1, "'llada' cannot have routers: its attention is not causal"),
        ({"sliding": (1, 2), "n_swa": 12}, 1, slides),
        ({"sliding": (1, 2), "n_swa": 12}, 3, None),
    ):
        path = Tiny(n_layer=4, **shape).route([layer], "kv").write(tmp_path / "mod.gguf")
        report = inspect(path)
        assert re.search(told or "^$", report["mod"].get("refused", ""))
        assert ("the runtime refuses this file: " in render(report)) == bool(told)


def test_inspect_json(run_cli, mod_file):
    result = run_cli("inspect", mod_file, "--json")
    assert json.loads(result.stdout) == inspect(mod_file)
