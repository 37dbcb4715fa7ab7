"""The benchmark on tiny models: its rows, and what must hold of them on any machine."""

import json

import numpy as np
import pytest
from raw import stock_lib
from tiny_gguf import Tiny

from mod_export import bench, bindings
from mod_export.errors import UserError

patched = pytest.mark.skipif(not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`")
KEYS = {"context", "phase", "activation", "ms_ceiling", "ms_floor", "ms_mod", "ms_all_active", "ms_none_active",
        "efficiency", "kv_bytes_dense", "kv_bytes_committed", "kv_bytes_used"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A MoD file and its dense one, wide enough for time to follow work; their tokens are bytes."""
    folder = tmp_path_factory.mktemp("bench")
    tiny = Tiny(n_layer=8, n_embd=256, n_ff=768, n_vocab=320, kv_window=32).route(range(2, 8), "block")
    tokens = np.random.default_rng(0).integers(0, 256, (1, 256))
    tiny.place_biases(tokens)
    return tiny.write(folder / "mod.gguf"), tiny.dense().write(folder / "dense.gguf"), folder


@patched
def test_rows(files):
    mod, dense, _ = files
    said = []
    text = "".join(chr(32 + c) for c in np.random.default_rng(0).integers(0, 90, 2000))
    rows = bench.bench(mod, dense, [64, 256], repeats=2, decode=8, threads=1, text=text, stock=stock_lib(),
                       say=said.append)
    assert [(r["context"], r["phase"]) for r in rows] == [(c, p) for c in (64, 256) for p in ("prefill", "decode")]
    for row in rows:
        assert KEYS <= set(row)
        assert 0 < row["activation"] < 1
        assert 0 < row["kv_bytes_used"] <= row["kv_bytes_committed"]
        assert row["kv_bytes_used"] < row["kv_bytes_dense"]
        assert min(row["rss_peak_bytes"].values()) > 1e6
    per_token = 2 * 2 * 2 * 64 * 8
    assert [r["kv_bytes_dense"] for r in rows] == [n * per_token for n in (64, 72, 256, 264)]
    long = rows[2]
    assert long["ms_none_active"] < long["ms_all_active"]
    assert sum(line.split()[1:2] == ["decode"] for line in bench.report(rows).splitlines()) == 2 * 2  # two tables
    json.dumps(rows)


def test_efficiency():
    ms = {"ms_ceiling": 10.0, "ms_floor": 2.0}
    assert bench.efficiency(ms | {"ms_mod": 6.0}, 0.5) == pytest.approx(1.0)
    assert bench.efficiency(ms | {"ms_mod": 8.0}, 0.5) == pytest.approx(0.5)
    assert bench.efficiency(ms | {"ms_mod": 8.0}, 1.0) is None
    assert bench.efficiency({"ms_ceiling": 2.0, "ms_floor": 2.0, "ms_mod": 2.0}, 0.5) is None


@patched
def test_files_that_do_not_fit(files, tmp_path):
    mod, dense, folder = files
    other = Tiny(n_vocab=64).write(tmp_path / "other.gguf")
    for pair, words in (((dense, dense), "is a dense model"), ((mod, other), "different vocabularies"),
                        ((mod, tmp_path / "none.gguf"), "does not exist")):
        with pytest.raises(UserError, match=words):
            bench.bench(*pair, [64], repeats=1, decode=4, threads=1, text="x" * 200, stock=stock_lib())


def test_bad_options(run_cli, tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    for args in (["--contexts", "512,many"], ["--contexts", "0"], ["--repeats", "0"],
                 ["--json", tmp_path / "rows.json"], ["--json", tmp_path / "none" / "rows.json"]):
        done = run_cli("bench", "none.gguf", "--dense", "none.gguf", *args)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert (tmp_path / "rows.json").read_text() == "[]"
