"""The benchmark on tiny models: pruned files, statistics, rows, and what must hold of them on any
machine.
"""

import json

import numpy as np
import pytest

from mod_export.benchmark import grouping, processes, sweep
from mod_export.benchmark import report as bench_report
from mod_export.benchmark import rows as bench_rows
from mod_export.benchmark import run as bench_run
from mod_export.benchmark.floor import block_floor, prune
from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile
from mod_export.runtime import bindings, devices
from tests.support.c_api import Raw, stock_lib
from tests.support.tiny_gguf import Tiny

patched = pytest.mark.skipif(
    not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`"
)
BYTES_PER_TOKEN = 2 * 2 * 2 * 64 * 8  # K and V, f16, 2 heads of 64, 8 layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def make(folder, kinds: str):
    """A MoD file and its dense one, wide enough for time to follow work; they have no vocabulary."""
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
    assert json.loads(bench_report.as_json(result)) == result
    assert 0.5 < result["about"]["floor_prefill_work"] < 0.9  # the FFN is 3/4 of a layer, of two
    assert (
        result["about"]["routed"] == {"block": 6}
        and result["about"]["files"]["dense"]["bytes"] > 1e6
    )


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


def test_which_files_have_a_pruned_floor(tmp_path):
    def floor(tiny: Tiny):
        return block_floor(GGUFFile.open(tiny.write(tmp_path / "x.gguf")))

    assert floor(Tiny().route([2, 4], "block")) == {2, 4}
    assert floor(Tiny().route([2, 4], "block+kv")) == {2, 4}
    assert floor(Tiny().route([2], "block").route([3], "kv")) is None
    assert floor(Tiny().route([2], "attn")) is None
    assert floor(Tiny()) is None
    with pytest.raises(UserError, match="has 5 layers, no layer 7"):
        prune(GGUFFile.open(Tiny().write(tmp_path / "x.gguf")), tmp_path / "y.gguf", {2, 7})
    assert not (tmp_path / "y.gguf").exists()


def test_ratio_is_free_of_drift_and_of_spikes():
    rng = np.random.default_rng(0)
    drift = np.linspace(1, 3, 8)[:, None] * np.ones(
        (8, 5)
    )  # the machine becomes slower from repeat to repeat
    reference = drift * [1, 2, 3, 4, 5] * rng.normal(1, 0.01, (8, 5))
    times = drift * [1, 2, 3, 4, 5] * rng.normal(1, 0.01, (8, 5)) * 1.1
    times[3, 2] *= 10
    found = bench_rows.ratio(times, reference)
    assert found["median"] == pytest.approx(1.1, abs=0.01)
    assert 1.08 < found["q1"] < found["median"] < found["q3"] < 1.12
    assert found["totals"] == pytest.approx(1.1, abs=0.03)


def test_long_turns_count_for_more():
    times, reference = np.array([[1.0, 1.0, 200.0]]), np.array([[1.0, 1.0, 100.0]])
    assert bench_rows.ratio(times, reference)["median"] == pytest.approx(2, abs=0.05)
    assert bench_rows.total(np.array([[1.0, 5.0], [2.0, 5.0], [9.0, 5.0]])) == 7


def test_efficiency():
    ceiling, floor = np.full((4, 3), 10.0), np.full((4, 3), 2.0)
    a = np.tile([0.25, 0.5, 0.75], (4, 1))
    exact = bench_rows.efficiency(ceiling, 2 + 8 * a, floor, a)
    assert exact == pytest.approx({"median": 1, "q1": 1, "q3": 1, "totals": 1})
    half = bench_rows.efficiency(ceiling, 6 + 4 * a, floor, a)
    assert half == pytest.approx({"median": 0.5, "q1": 0.5, "q3": 0.5, "totals": 0.5})
    assert bench_rows.efficiency(ceiling, ceiling, floor, np.ones((4, 3))) is None
    assert bench_rows.efficiency(floor, floor, floor, a) is None


def test_memory_on_a_gpu_in_tables():
    row = {
        "context": 64,
        "batch": 1,
        "ubatch": 512,
        "kv_type": "f16",
        "flash_attn": True,
        "shift": 0.0,
        "beyond_training": False,
        "phase": "decode",
        "kv_bytes": {},
        "ms": {"mod": 1.0, "ceiling": 2.0},
        "rss_peak_bytes": {"mod": 3e6},
        "vram_bytes": {"mod": 7e6},
    }
    assert "GPU MoD" in (table := bench_report._memory([row], False)) and " 7" in table
    assert "GPU" not in bench_report._memory([row | {"vram_bytes": {}}], False)


def test_groups_keep_what_is_compared_together(caplog):
    variants = [v for v in bench_run.VARIANTS if v != "ceiling_split"]
    need = dict.fromkeys(variants, 10)
    assert (
        grouping.groups(variants, need, 60)
        == [["ceiling", "floor", "dense_patched", "mod", "all_active", "none_active"]]
        and not caplog.messages
    )
    assert grouping.groups(variants, need, 45) == [
        ["ceiling", "floor", "mod", "none_active"],
        ["ceiling", "dense_patched", "all_active"],
    ]
    assert len(grouping.groups(variants, need, 30)) == 3
    assert len(caplog.messages) == 2 and "in groups" in caplog.messages[0]
    assert grouping.groups(["ceiling", "mod"], need, 30) == [["ceiling", "mod"]]
    grouping.groups(variants, need, 10)
    assert "may end or swap" in caplog.messages[-1]


def test_library_path_keeps_the_users_behind_ours(monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/driver")
    assert processes.library_path("/lib") == "/lib:/driver"
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert processes.library_path("/lib") == "/lib"


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
    more = grouping.process_bytes(dense, 0, 1, on_gpu=True) - grouping.GPU_PROCESS_BYTES
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


def test_bad_options(run_cli, tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    for args in (
        ["--contexts", "512,many"],
        ["--contexts", "0"],
        ["--rounds", "0"],
        ["--batch", "0"],
        ["--flash-attn", "maybe"],
        ["--variants", "all"],
        ["--threshold-shift", "nan"],
        ["--json", tmp_path / "rows.json"],
        ["--json", tmp_path / "none" / "rows.json"],
    ):
        done = run_cli("bench", "none.gguf", "--dense", "none.gguf", *args)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert (tmp_path / "rows.json").read_text() == "[]"


def test_bad_types():
    for options, words in (
        ({"kv_types": ("q9",)}, "q9"),
        ({"kv_types": ("f16/q8_0/f16",)}, "unknown"),
        ({"kv_types": ("q8_0",), "flash_attn": (False,)}, "needs flash attention"),
        ({"contexts": (1 << 40,)}, "use one below"),
    ):
        with pytest.raises(UserError, match=words):
            bench_run.steps(bench_run.BenchOptions(**{"contexts": (64,)} | options))
