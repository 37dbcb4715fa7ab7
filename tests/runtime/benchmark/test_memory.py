"""`mod-export fit`: what it predicts against the file's own numbers, and against real runs of small
models.
"""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest

from mod_export.benchmark import memory
from mod_export.benchmark.memory import MIB, MemoryModel, MemoryOptions
from mod_export.formats.kv_size import expected_cells
from mod_export.runtime import bindings
from mod_export.synthetic.keys import header
from mod_export.synthetic.routers import SynthesisOptions, routing_of
from mod_export.synthetic.shape import PRESETS
from mod_export.synthetic.write import synth
from tests.support.tiny_gguf import Tiny

patched = pytest.mark.skipif(
    not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`"
)
TEXT = "".join(chr(32 + c) for c in np.random.default_rng(0).integers(0, 90, 4000))


def make(kinds: str, **options) -> Tiny:
    """Wide enough for its K/V to show in a process of 60 MiB: 28 kB per token. Tokens are bytes."""
    tiny = Tiny(
        n_layer=14,
        n_embd=512,
        n_head=8,
        n_head_kv=8,
        n_vocab=320,
        kv_window=32,
        n_ctx=2048,
        **options,
    )
    tiny.route(range(2, 14), kinds)
    return tiny.place_biases([list(TEXT[:768].encode())])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    """A kv model whose activation is half, as its file says; its dense one; one whose file says too
    little.
    """
    folder, tiny = tmp_path_factory.mktemp("memory"), make("kv")
    low = tiny.mod_keys()["kv.activation"]
    return {
        "mod": tiny.write(folder / "mod.gguf"),
        "dense": tiny.dense().write(folder / "dense.gguf"),
        "liar": tiny.write(
            folder / "liar.gguf", {"kv.activation": ([0.02 * x for x in low[0]], *low[1:])}
        ),
    }


@patched
def test_the_needs_follow_the_file(files):
    options = MemoryOptions(ubatch=128, margin=0.2)
    mod, dense = MemoryModel(files["mod"], options), MemoryModel(files["dense"], options)
    per_layer = 2 * 2 * 512  # f16
    for n in (256, 2048, 100_096):
        assert dense.need(n).kv == pytest.approx(n * 14 * per_layer, rel=1e-3)
        cells = 2 * n + 12 * expected_cells(mod.config, 5, n, 0.2) + 128
        assert mod.need(n).kv == pytest.approx(min(cells, 14 * n) * per_layer + 14 * 4096, rel=1e-3)
        assert mod.as_dense().need(n).kv == dense.need(n).kv
        assert mod.as_dense().need(n).total == pytest.approx(dense.need(n).total, rel=0.02)
    assert dense.need(512).weights == files["dense"].stat().st_size
    quantised = MemoryModel(files["dense"], replace(options, kv_type="q8_0/q4_0"))
    share = (34 + 18) / 128
    assert quantised.need(2048).kv == pytest.approx(dense.need(2048).kv * share, rel=1e-3)
    routed = MemoryModel(files["mod"], replace(options, kv_type="q8_0/q4_0"))
    routed.probe = mod.probe  # which costs a process, and says nothing of the K/V
    pages = 14 * 4096
    expected = (mod.need(2048).kv - pages) * share + pages
    assert routed.need(2048).kv == pytest.approx(expected, rel=1e-3)


@patched
def test_the_largest_context_is_the_largest(files):
    plan = memory.fit(files["mod"], 300 * MIB, MemoryOptions(), files["dense"])
    for name, n in plan.unlimited.items():
        assert (
            plan.models[name].need(n).total
            <= 300 * MIB
            < plan.models[name].need(n + memory.CONTEXT_STEP_TOKENS).total
        )
    assert plan.unlimited["MoD"] > 1.2 * plan.unlimited["dense"]
    assert {need.context for need in plan.needs.values()} == {2048}  # the trained one
    text = memory.report(plan)
    assert text.count("stops at the 2048 tokens that the model was trained for") == 2
    assert "0.500 on calibration text, and 10% more" in text
    # half a step more: what the process takes is measured anew, and differs by some pages
    enough = (
        sum(plan.models["dense"].need(n).total for n in (1024, 1024 + memory.CONTEXT_STEP_TOKENS))
        // 2
    )
    tight = memory.fit(files["mod"], enough, MemoryOptions(), files["dense"])
    assert tight.needs["dense"].context == 1024 < tight.needs["MoD"].context < 2048
    assert "trained" not in memory.report(tight)


@patched
def test_a_run_takes_what_was_predicted(files):
    plan = memory.fit(files["mod"], 1024 * MIB, MemoryOptions(ubatch=256), files["dense"])
    rows = memory.check(plan, TEXT, 1536)
    assert [(r["model"], r["context"], r["tokens"], r["ok"]) for r in rows] == [
        ("dense", 1536, 1536, True),
        ("MoD", 1536, 1536, True),
    ]
    for row in rows:
        assert row["needed"] == pytest.approx(row["predicted"], rel=0.1)
        assert row["kv"] == pytest.approx(row["predicted_kv"], rel=0.2)
        assert row["kv_used"] <= row["kv"] and row["needed"] <= row["peak"]
    assert rows[1]["kv"] < 0.75 * rows[0]["kv"] and 0.3 < rows[1]["activation"] < 0.6
    assert memory.check_report(rows).count("yes") == 2


@patched
def test_a_hybrid(tmp_path):
    """States are in the cache, in checkpoints and in kept graphs, which fit left out once.

    It left out graphs beside the first one too, which have room for 40 nodes for each token.
    """
    narrow = {"layers": 4, "embd": 512, "heads": 2, "heads_kv": 2, "ff": 256, "vocab": 320}
    shape = replace(PRESETS["qwen3.5-4b"], **narrow)
    mod, dense = tmp_path / "mod.gguf", tmp_path / "dense.gguf"
    synth(mod, shape, "q8_0", routing_of(header(shape), SynthesisOptions("kv+ffn")), dense)
    plan = memory.fit(mod, 600 * MIB, MemoryOptions(ubatch=512), dense)
    for row in memory.check(plan, TEXT, 1536):
        assert 0.85 < row["needed"] / row["predicted"] < 1.05


@patched
@pytest.mark.parametrize("kinds", ["block", "attn+ffn"])
def test_other_units(kinds, tmp_path, caplog):
    caplog.set_level(logging.INFO, "mod_export")
    plan = memory.fit(make(kinds).write(tmp_path / "mod.gguf"), 1024 * MIB, MemoryOptions())
    (row,) = memory.check(plan, TEXT, 1024)
    assert row["ok"] and row["needed"] == pytest.approx(row["predicted"], rel=0.1)
    assert any("--dense" in line for line in caplog.messages)


@patched
def test_a_file_that_promises_too_little_fails_the_check(files, run_cli):
    done = run_cli(
        "fit", files["liar"], "--memory", "1G", "--check", "--text", __file__, "--threads", 2
    )
    assert done.returncode == 1 and "NO" in done.stdout, done.stderr


@patched
def test_json_and_a_dense_file(files, run_cli):
    done = run_cli("fit", files["dense"], "--memory", "300M", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["memory"], list(told["models"]), told["checks"]) == (300 << 20, ["dense"], None)
    assert told["models"]["dense"]["context"] == told["models"]["dense"]["n_ctx_train"] == 2048


@patched
def test_bad_input(files, run_cli, tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    for args, words in (
        ((files["mod"], "--memory", "much"), "no size of memory"),
        ((files["mod"], "--memory", "20M"), "do not hold the weights"),
        (
            (files["mod"], "--memory", f"{files['mod'].stat().st_size}"),
            "for a context of 256 tokens",
        ),
        ((files["dense"], "--memory", "1G", "--dense", files["dense"]), "is a dense model"),
        ((tmp_path / "none.gguf", "--memory", "1G"), "no such file"),
        ((tmp_path / "no.gguf", "--memory", "1G"), "truncated"),
        ((files["mod"], "--memory", "1G", "-ctk", "f64"), "--cache-type-k"),
        ((files["mod"], "--memory", "1G", "--kv-type", "f64"), "K in 'f64'; use one of f32"),
        ((files["mod"], "--memory", "1G", "--ubatch", "8192"), "--ubatch"),
        ((files["mod"], "--memory", "1G", "--margin", "inf"), "not a finite number"),
        (
            (files["mod"], "--memory", "1G", "--check", "--text", tmp_path / "none.txt"),
            "cannot read",
        ),
    ):
        done = run_cli("fit", *args)
        assert (
            (done.returncode, done.stdout) == (2, "")
            and done.stderr.count("\n") == 1
            and words in done.stderr
        )
