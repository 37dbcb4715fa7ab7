"""scripts/gpu/pack.sh, check.sh and their parts, as far as they go without a GPU, a network or a
built library.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from mod_export.data.text import default_texts
from mod_export.formats import adapter_files
from mod_export.formats.base_identity import gguf_identity
from mod_export.formats.gguf import GGUFFile
from tests.support.short_smollm2 import short_smollm2

ROOT = Path(__file__).resolve().parents[2]
N_LAYER = 4


def shell(command, **env):
    return subprocess.run(
        ["bash", "-c", command], env=os.environ | env, capture_output=True, text=True
    )


def one_line(result, words, code=2):
    assert (result.returncode, result.stderr.count("\n")) == (code, 1) and words in result.stderr, (
        result.stderr
    )


@pytest.fixture
def part(tmp_path, monkeypatch):
    """Imports a part as check.sh would run it, in a rehearsal."""
    for name, value in {
        "MOD_REHEARSE": "1",
        "GPU_WORK": str(tmp_path),
        "GPU_RESULTS": str(tmp_path / "results"),
        "MINUTES": "8",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(ROOT / "scripts/gpu"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (
            getattr(sys.modules[name], "__file__", None)
            and "scripts/gpu/" in sys.modules[name].__file__
        ):
            del sys.modules[name]


def test_pieces_and_back(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").write_text("text")
    source = f"source {ROOT}/scripts/gpu/pieces.sh; "
    assert shell(f"{source} pieces {tmp_path}/p {tmp_path}/a").returncode == 0
    unpack = f"{source} unpack {tmp_path}/p {tmp_path}/w {sys.executable}"
    assert shell(unpack).returncode == 0 and (tmp_path / "w/b/file").read_text() == "text"
    (tmp_path / "p/piece.00").write_text("damaged")
    assert shell(unpack).returncode == 0  # it was done before
    (tmp_path / "p/SHA256SUMS").write_text("of other pieces")
    assert shell(unpack).returncode == 2
    result = shell(unpack.replace(f"{tmp_path}/w", f"{tmp_path}/v"))
    assert result.returncode == 2 and "missing or damaged" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "v").exists()


def short_start(folder):
    """Make `start` of the packaged adapter, for its model's first layers.

    It has windows that short sequences leave.
    """
    packaged, adapter = adapter_files.resolve("smollm2-kv"), folder / "start"
    base = short_smollm2(folder / "base.gguf", N_LAYER)
    about = json.loads((packaged / adapter_files.MOD_JSON).read_text())
    units = about["mod"]["kv"]
    del units["window"]
    about["mod"]["kv_window"] = 200
    for name in ("threshold", "activation"):
        units[name] = units[name][: N_LAYER * units["heads"]]
    about["model"] = str(base)
    about["base"] |= gguf_identity(GGUFFile.open(base))
    tensors = load_file(packaged / adapter_files.ROUTERS)
    kept = {name: value for name, value in tensors.items() if int(name.split(".")[2]) < N_LAYER}
    adapter.mkdir()
    save_file(kept, adapter / adapter_files.ROUTERS)
    (adapter / adapter_files.MOD_JSON).write_text(json.dumps(about))


def test_gpu_train(tmp_path):
    """The packaged adapter, for a few layers, trained on for two steps, and judged."""
    text = "\n\n".join(default_texts())
    (tmp_path / "data/dev").mkdir(parents=True)
    (tmp_path / "data/train.txt").write_text(text[:18000])
    (tmp_path / "data/dev/a.txt").write_text(text[-3000:])
    (tmp_path / "unpacked-pieces").touch()
    short_start(tmp_path)
    command = f"{ROOT}/scripts/gpu/train.sh {tmp_path}/pieces {tmp_path} 528"
    env = {"PYTHON": sys.executable, "LENGTH": "264", "BATCH": "1", "COUNT": "1"}
    one_line(shell(command, PYTHON="/none"), "/none lacks torch")
    early = shell(command, **env, MINUTES="0.01")
    assert (
        early.returncode == 2
        and "give more MINUTES" in early.stderr
        and not (tmp_path / "trained").exists()
    )
    result = shell(command, **env)
    assert result.returncode == 0, result.stderr
    before, after = (
        json.loads((tmp_path / f"eval-{name}.json").read_text()) for name in ("start", "trained")
    )
    losses = [
        row["loss"]
        for row in map(json.loads, (tmp_path / "trained.run/metrics.jsonl").open())
        if "loss" in row
    ]
    assert len(losses) == 2 and (tmp_path / "trained/routers.safetensors").exists()
    assert before["texts"][0]["kl"] != after["texts"][0]["kl"] < 0.05


def test_what_is_wrong_is_one_line(tmp_path):
    check = f"{ROOT}/scripts/gpu/check.sh"
    one_line(shell(check), "usage: scripts/gpu/check.sh")
    one_line(shell(f"{check} all {tmp_path} {tmp_path}/w"), "usage: scripts/gpu/check.sh")
    python = {"PYTHON": sys.executable}
    one_line(
        shell(f"{check} build {tmp_path} {tmp_path}/w", **python),
        f"there are no pieces in {tmp_path}/build",
    )
    one_line(shell(f"{check} ops {tmp_path} {tmp_path}/w", PYTHON="/none"), "/none is no Python")
    source = f"source {ROOT}/scripts/gpu/pieces.sh"
    empty = tmp_path / "e"
    result = shell(f"{source}; mkdir {empty}; pieces {tmp_path}/build {empty}")
    assert result.stderr == ""
    one_line(
        shell(f"{check} --rehearse ops {tmp_path} {tmp_path}/w", **python),
        "other patches than this checkout",
    )
    pack = f"{ROOT}/scripts/gpu/pack.sh"
    one_line(shell(f"{pack} {tmp_path}", **python), "exists already")
    one_line(shell(f"{pack} {tmp_path}/new {tmp_path}/none", **python), "there is no")


def test_sources_are_trimmed(part, tmp_path):
    pack = part("pack")
    root = tmp_path / "source/vendor/llama.cpp"
    names = [
        "ggml/src/ggml-cuda/instances/a.cu",
        "ggml/src/ggml-vulkan/a.cpp",
        "ggml/src/ggml.c",
        "ggml/include/ggml.h",
        "src/models/a.cpp",
        "tools/ui/a.js",
        "tests/test-backend-ops.cpp",
        "tests/test-log.cpp",
        "CMakeLists.txt",
        "LICENSE",
        "cmake/a.cmake",
        "include/llama.h",
        "vendor/stb/stb.h",
        "../../llama_cpp/llama.py",
        "../../llama_cpp/server/app.py",
    ]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    pack.copy_source(tmp_path / "source", tmp_path / "target")
    copied, top = tmp_path / "target", tmp_path / "target/vendor/llama.cpp"
    found = {os.path.relpath(path, top) for path in copied.rglob("*") if path.is_file()}
    left_out = {
        "ggml/src/ggml-vulkan/a.cpp",
        "tools/ui/a.js",
        "tests/test-log.cpp",
        "../../llama_cpp/server/app.py",
    }
    assert found == set(names) - left_out


def test_without_a_gpu_nothing_is_compared(part, monkeypatch, capsys):
    common = part("common")
    monkeypatch.setattr(common, "REHEARSE", False)
    monkeypatch.setattr("mod_export.runtime.devices.gpus", list)
    with pytest.raises(SystemExit) as exit:
        common.part(lambda: True)
    assert exit.value.code == 2 and "sees no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        common.part(lambda: True, needs_gpu=False)
    assert exit.value.code == 0


@pytest.mark.parametrize(
    "bad", [None, "  MOD_MASK(n=1): FAIL", "  MOD_MASK(n=1): not supported [CUDA0]"]
)
def test_ops_reads_test_backend_ops(bad, part, tmp_path):
    ops = part("ops")
    lines = [f"  {op}(type=f32,n=1): \033[1;32mOK\033[0m" for op in ops.OPS.split(",")] + [
        bad or "  done"
    ]
    script = tmp_path / "test-backend-ops"
    script.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    script.chmod(0o755)
    assert ops.main() is (bad is None)
    result = json.loads((tmp_path / "results/ops.json").read_text())
    assert result["passed"] is (bad is None) and result["cases"]["MOD_SCORE"] == 1
    assert (
        result["failed"] == ([bad.strip()] if bad else [])
        and result["machine"]["rehearsal"] is True
    )
    script.write_text("#!/bin/sh\n")
    assert ops.main() is False  # no case has run


def test_bench_goes_on_after_a_line_that_was_cut_off(part, tmp_path, monkeypatch):
    bench = part("bench")
    path = tmp_path / "results/bench.jsonl"
    bench.append({"point": "a"})
    with path.open("a") as file:
        file.write('{"point": "b", "sec')
    assert [line["point"] for line in bench.finished()] == ["a"]
    bench.append({"point": "c"})
    assert [line["point"] for line in bench.finished()] == ["a", "c"]
    monkeypatch.setenv("CONTEXTS", "64,many")
    with pytest.raises(bench.UserError, match="CONTEXTS is '64,many'"):
        bench.points()


def test_bench_begins_no_point_that_would_not_end(part, tmp_path, monkeypatch):
    bench = part("bench")
    monkeypatch.setattr(bench, "REHEARSE", False)
    # one graph is another way for attn only
    chosen = {
        "SHAPES": "8b",
        "QUANTS": "q4_0",
        "UNITS": "attn,kv",
        "WAYS": "graph,segments",
        "CONTEXTS": "64",
    }
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert [(p.units, p.way) for p in bench.points()] == [
        ("attn", "graph"),
        ("attn", "segments"),
        ("kv", "segments"),
    ]
    monkeypatch.setenv("WAYS", "graphs")
    with pytest.raises(bench.UserError, match="WAYS has graphs"):
        bench.points()
    for name, value in {
        "UNITS": "kv",
        "WAYS": "segments",
        "CONTEXTS": "64,128",
        "MINUTES": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bench, "machine", lambda: {"build": "this"})
    for build, seconds in (("earlier", 1.0), ("this", 70.0)):
        bench.append(
            {"point": "8b q4_0 kv segments 64", "machine": {"build": build}, "seconds": seconds}
        )
    monkeypatch.setattr(bench, "measure", lambda point: {"error": "no memory"})
    with pytest.raises(SystemExit) as exit:
        bench.main()
    assert exit.value.code == 3
    monkeypatch.setenv("MINUTES", "2")
    assert (
        bench.main() is False
    )  # a point that failed is told of at the end, and is not tried again
    assert [line.get("error") for line in bench.finished()] == [None, None, "no memory"]


def test_sanitizers_findings_are_kept(part, tmp_path):
    sanitize = part("sanitize")
    script = tmp_path / "program"
    script.write_text(
        "#!/bin/sh\necho '========= ERROR SUMMARY: 1 error'\necho noise\nexit $CODE\n"
    )
    script.chmod(0o755)
    clean, bad = (sanitize.run([str(script)], {"CODE": str(code)}) for code in (0, sanitize.FOUND))
    assert clean["summary"] == ["ERROR SUMMARY: 1 error"] and "lines" not in clean
    assert bad["exit"] == sanitize.FOUND and bad["lines"] == ["========= ERROR SUMMARY: 1 error"]
