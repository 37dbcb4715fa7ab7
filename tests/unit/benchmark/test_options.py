"""Options of the benchmark, the sweep and the memory plan that cannot be."""

import pytest

from mod_export.benchmark import memory
from mod_export.benchmark import run as bench_run
from mod_export.errors import UserError


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
        ["--kv-type", "f16", "-ctk", "q8_0"],
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
        ({"kv_types": ("f16/q6_k",)}, "the cache cannot hold V in 'q6_k'"),
        ({"kv_types": ("q8_0",), "flash_attn": (False,)}, "needs flash attention"),
        ({"contexts": (1 << 40,)}, "use one below"),
    ):
        with pytest.raises(UserError, match=words):
            bench_run.steps(bench_run.BenchOptions(**{"contexts": (64,)} | options))


def test_bad_sweeps_and_plots(run_cli, tmp_path):
    (tmp_path / "file").touch()
    for args in (
        ["--activations", "0.5"],
        ["--sweep-activation", "--activations", "0.5,x"],
        ["--sweep-activation", "--activations", "0.5", "--threshold-shift", "1"],
        ["--plots", tmp_path / "file"],
        ["--plots", tmp_path / "no" / "plots"],
    ):
        done = run_cli("bench", "none.gguf", "--dense", "none.gguf", *args)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, (
            done.stderr
        )


def test_sizes():
    for text, size in {
        "8G": 8 << 30,
        "512m": 512 << 20,
        "1.5GiB": 3 << 29,
        " 2 kb ": 2048,
        "123456": 123456,
    }.items():
        assert memory.parse_size(text) == size
    for text in ("", "8X", "-1G", "0", "lots", "1GG"):
        with pytest.raises(UserError, match="no size of memory"):
            memory.parse_size(text)
