"""The benchmark on tiny models: pruned files, statistics, rows, and what must hold of them on any
machine.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from mod_export.benchmark import grouping, processes, sweep
from mod_export.benchmark import report as bench_report
from mod_export.benchmark import run as bench_run
from mod_export.benchmark.floor import prune
from mod_export.benchmark.llama_bench import llama_bench_rows
from mod_export.common.text import result_as_json
from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile
from mod_export.llamacpp import source
from mod_export.runtime import bindings, devices
from mod_export.synthetic.keys import header
from mod_export.synthetic.routers import SynthesisOptions, routing_of
from mod_export.synthetic.shape import PRESETS
from mod_export.synthetic.write import synth
from tests.support.c_api import Raw, stock_lib
from tests.support.gguf_models import changed
from tests.support.tiny_gguf import Tiny

patched = pytest.mark.skipif(
    not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`"
)
BYTES_PER_TOKEN = 2 * 2 * 2 * 64 * 8  # K and V, f16, 2 heads of 64, 8 layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def make(folder, kinds: str):
    """A MoD file and its dense one without a vocabulary, wide enough for time to follow work."""
    tiny = Tiny(n_layer=8, n_embd=256, n_ff=768, n_vocab=320, kv_window=32).route(
        range(2, 8), kinds
    )
    tiny.place_biases(np.random.default_rng(0).integers(0, 320, (1, 256)))
    mod, dense = folder / f"{kinds}.gguf", folder / "dense.gguf"
    return tiny.write(mod), dense if dense.exists() else tiny.dense().write(dense)


@pytest.fixture(scope="module")
def files(folder):
    return make(folder, "block")


def run(file, dense, **options) -> dict:
    options = bench_run.BenchOptions(
        **{"contexts": (64,), "rounds": 1, "seconds": 0, "threads": 1} | options
    )
    return bench_run.bench(file, dense, options, stock=stock_lib())


@patched
def test_rows(files):
    result = run(*files, contexts=(64, 256), rounds=2)
    rows = result["rows"]
    assert [(r["context"], r["phase"]) for r in rows] == [
        (c, p) for c in (64, 256) for p in ("prefill", "decode")
    ]
    for row in rows:
        assert set(row["ms"]) == set(bench_run.VARIANTS) - {"ceiling_split"}
        assert set(row["ratios"]) == {
            "dense_patched/ceiling",
            "all_active/ceiling",
            "none_active/floor",
            "mod/ceiling",
        }
        assert row["efficiency"] != row["efficiency_to_none_active"]
        assert 0 < row["activation"] < 1 and row["work"] == pytest.approx(
            row["activation"], abs=0.1
        )
        kv = row["kv_bytes"]["mod"]
        assert 0 < kv["used"] <= kv["committed"] and kv["used"] < kv["dense"]
        assert min(row["rss_peak_bytes"].values()) > 1e6
        more = row["perf"]["mod"]["graphs"] - row["perf"]["none_active"]["graphs"]
        assert more > 0 if row["phase"] == "prefill" else more == 0  # one graph a token
    assert [r["kv_bytes"]["mod"]["dense"] for r in rows] == [
        n * BYTES_PER_TOKEN for n in (64, 128, 256, 320)
    ]
    assert [r["kv_bytes"]["all_active"]["used"] for r in rows] == [
        n * BYTES_PER_TOKEN for n in (64, 128, 256, 320)
    ]
    assert [r["ttft_ms"]["mod"] > r["ms"]["mod"] for r in rows[::2]] == [True, True]
    assert rows[2]["ms"]["floor"] < rows[2]["ms"]["ceiling"]
    assert json.loads(result_as_json(result)) == result
    check_rows_of_llama_bench(result, files)
    assert 0.5 < result["about"]["floor_prefill_work"] < 0.9  # the FFN is 3/4 of a layer, of two
    assert (
        result["about"]["routed"] == {"block": 6}
        and result["about"]["files"]["dense"]["bytes"] > 1e6
    )


def check_rows_of_llama_bench(result: dict, files: tuple) -> None:
    """They have what llama-bench writes and compare-llama-bench.py asks for."""
    found = [json.loads(json.dumps(row)) for row in llama_bench_rows(result)]
    assert len(found) == 2 * 2 * 6
    row = next(r for r in found if (r["variant"], r["n_depth"]) == ("mod", 256))
    assert (row["n_prompt"], row["n_gen"], row["type_k"], row["n_threads"]) == (0, 64, "f16", 1)
    turns = result["rows"][3]["raw_ms"]["mod"][0]  # 8 turns of 8 tokens, of which 7 are timed
    assert row["samples_ts"][0] == pytest.approx(1e3 * 56 / sum(turns))
    assert (row["model_filename"], row["model_size"] > 1e6) == (str(files[0]), True)
    names = {(r["build_commit"], r["model_filename"]) for r in found}
    assert len(names) == 6 and {len(r["build_commit"]) for r in found} == {9}
    tools = source.source_dir() / "vendor" / "llama.cpp"
    fields = (tools / "tools/llama-bench/llama-bench.cpp").read_text().split("get_fields() {")[1]
    assert set(re.findall(r'"(\w+)"', fields.split("};")[0])) <= set(row)
    script = (tools / "scripts/compare-llama-bench.py").read_text()
    keys = script.split("LLAMA_BENCH_KEY_PROPERTIES = [")[1].split("]")[0]
    assert set(re.findall(r'"(\w+)"', keys)) | {"test_time", "avg_ts"} <= set(row)


@patched
def test_processes_that_are_started_anew(files):
    """Twice the turns, and the counters of both."""
    variants = ("ceiling", "mod", "none_active")
    once, twice = (run(*files, variants=variants, starts=starts)["rows"] for starts in (1, 2))
    for a, b in zip(once, twice, strict=True):
        assert (b["repeats"], b["turns"]) == (2 * a["repeats"], a["turns"])
        assert b["perf"]["mod"]["tokens"] == 2 * a["perf"]["mod"]["tokens"]
        assert b["activation"] == pytest.approx(a["activation"])


@patched
def test_a_hybrid(tmp_path):
    """Decoded tokens cannot be taken from recurrent states, so the states after the prompt are put
    back: with several repeats the first bench of a hybrid ended in an error.
    """
    narrow = {"layers": 4, "embd": 512, "heads": 2, "heads_kv": 2, "ff": 256, "vocab": 256}
    shape = replace(PRESETS["qwen3.5-4b"], net_head=32, **narrow)
    config = routing_of(header(shape), SynthesisOptions("kv+ffn", kv_window=32))
    mod, dense = tmp_path / "mod.gguf", tmp_path / "dense.gguf"
    synth(mod, shape, "q8_0", config, dense)
    options = {"variants": ("ceiling", "mod"), "rounds": 4, "batches": (2,)}
    result = run(mod, dense, **options)
    assert [row["repeats"] for row in result["rows"]] == [2, 2]
    states = 3 * 4 * (32 * 32 * 32 + 3 * (2 * 16 + 32) * 32)  # layers, f32, matrices, convolution
    assert result["about"]["state_bytes"] == states
    told = bench_report.tables(result)
    assert f"has recurrent states, {states / 1e6:.2f} MB in a dense model" in told
    (decode,) = (row for row in result["rows"] if row["phase"] == "decode")
    tokens = 2 * (64 + 64)
    assert decode["kv_bytes"]["mod"]["dense"] == tokens * 2 * 2 * 2 * 256  # of the one full layer


@patched
def test_settings(folder):
    """Batches, K/V types, shifts and ubatches; kv units, whose floor is the MoD file itself."""
    file, dense = make(folder, "kv")
    rows = run(
        file,
        dense,
        batches=(3,),
        kv_types=("q8_0", "f16/q8_0"),
        shifts=(0.0, 50.0),
        ubatches=(16,),
        variants=("ceiling", "ceiling_split", "mod", "none_active"),
    )["rows"]
    assert len(rows) == 2 * 2 * 2
    assert {r["floor"] for r in rows} == {"none_active"}
    for row in rows:
        assert ("ceiling_split" in row["ms"]) == (row["shift"] == 0)
        size = 2 * 34 / 32 if row["kv_type"] == "q8_0" else 2 + 34 / 32
        tokens = row["batch"] * (64 if row["phase"] == "prefill" else 128)
        assert row["kv_bytes"]["ceiling"]["used"] == tokens * 64 * 2 * 8 * size
        assert row["activation"] < 0.06 if row["shift"] else row["activation"] > 0.2
    assert "stock, split KV" in bench_report.tables({"about": {}, "rows": rows})


@patched
def test_beyond_training(folder, caplog):
    tiny = Tiny(n_layer=3, n_ctx=128).route([1], "attn+ffn")
    tiny.place_biases(np.random.default_rng(0).integers(0, 96, (1, 128)))
    file, dense = tiny.write(folder / "short.gguf"), tiny.dense().write(folder / "short-dense.gguf")
    rows = run(file, dense, contexts=(128, 256), flash_attn=(False,), variants=("ceiling", "mod"))[
        "rows"
    ]
    assert [r["beyond_training"] for r in rows] == [False, False, True, True]
    assert any("beyond the 128 of training" in line for line in caplog.messages)
    assert rows[2]["efficiency"] is None  # there is no floor
    table = bench_report.tables({"about": {}, "rows": rows}, markdown=True)
    assert " 256* |" in table and " 128 |" in table and "for timing only" in table


@patched
@pytest.mark.parametrize("layers", [{0, 3}, {2, 3, 4}])
def test_pruned_file_is_the_model_without_these_layers(tmp_path, layers):
    tiny = Tiny()
    source = tiny.write(tmp_path / "dense.gguf")
    prune(GGUFFile.open(source), tmp_path / "pruned.gguf", layers)
    expected = tiny.without([(layer, "block") for layer in layers]).write(
        tmp_path / "expected.gguf"
    )
    assert (tmp_path / "pruned.gguf").read_bytes() == expected.read_bytes()
    with Raw(tmp_path / "pruned.gguf") as model:
        logits = model.decode(list(range(20)))
    reference = tiny.without([(layer, "block") for layer in layers]).forward(list(range(20))).logits
    assert np.abs(logits - reference).max() < 1e-3


@patched
def test_gpu(files, monkeypatch):
    """Memory that processes take of a GPU is theirs alone, so fewer run at once; a CPU build has
    none.
    """
    with pytest.raises(UserError, match="sees no GPU; run `mod-export build --cuda`"):
        run(*files, gpu_layers=-1)
    free = iter([100, 100, 80, 75, 75])
    monkeypatch.setattr(devices, "gpus", lambda: [devices.Gpu("a", next(free), 200)])
    meter = devices.GpuMemoryMeter()
    assert [meter.during(lambda x: x, x) for x in "ab"] == ["a", "b"] and meter.used == 20
    monkeypatch.setattr(
        devices, "gpus", lambda: [devices.Gpu("a", 1000, 2000), devices.Gpu("b", 500, 2000)]
    )
    assert grouping.available_memory(on_gpu=True) == 1350
    dense = GGUFFile.open(files[1])
    more = grouping.process_bytes(dense, 0, on_gpu=True) - grouping.GPU_PROCESS_BYTES
    assert more == sum(t.nbytes for t in dense.tensors.values())


@patched
def test_groups_are_measured_one_after_the_other(files, monkeypatch):
    monkeypatch.setattr(
        grouping, "available_memory", lambda _: 3 * grouping.PROCESS_BYTES + (100 << 20)
    )
    rows = run(*files)["rows"]
    assert set(rows[0]["ratios"]) == {
        "dense_patched/ceiling",
        "all_active/ceiling",
        "none_active/floor",
        "mod/ceiling",
    }


@patched
def test_files_that_do_not_fit(files, tmp_path):
    mod, dense = files
    other = Tiny(n_vocab=64).write(tmp_path / "other.gguf")
    (tmp_path / "damaged.gguf").write_bytes(dense.read_bytes()[:5000])
    for pair, words in (
        ((dense, dense), "is a dense model"),
        ((mod, mod), "is a MoD file"),
        ((mod, other), "not of one model"),
        ((mod, tmp_path / "none.gguf"), "no such file"),
        ((mod, tmp_path / "damaged.gguf"), "is truncated"),
    ):
        with pytest.raises(UserError, match=words):
            run(*pair)
    with pytest.raises(UserError, match="activation 2 is not between 0 and 1"):
        sweep.sweep(mod, dense, bench_run.BenchOptions(), targets=(2, 0.5))


def test_a_matrix_of_one_row_has_one_shape(files, tmp_path):
    """Gates of shared experts are [n, 1] as the converter writes them, and [n] as the quantiser."""
    name = "blk.0.ffn_gate_inp_shexp.weight"
    mod, dense = (
        changed(path, tmp_path / path.name, added_tensors={name: np.ones(shape, np.float32)})
        for path, shape in zip(files, [(64,), (1, 64)], strict=True)
    )
    assert bench_run.check_files(mod, dense)[1].path == dense


@patched
def test_an_error_in_a_process_is_one_clear_line(files):
    with pytest.raises(
        UserError, match="mod: cannot load .*none.gguf|mod: .*none.gguf does not exist"
    ):
        processes.Worker("mod", {"file": "none.gguf", "text": "x", "context": 64, "tail": 64})
    with pytest.raises(UserError, match="mod: TypeError"):
        processes.Worker("mod", {"no": "setup"})
    worker = processes.Worker(
        "mod", {"file": str(files[0]), "text": "x", "context": 64, "tail": 64}
    )
    worker.process.kill()
    with pytest.raises(UserError, match="the process of mod ended with code -9"):
        worker.ask(do="state")
    worker.close()
