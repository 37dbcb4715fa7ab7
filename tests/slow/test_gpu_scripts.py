"""scripts/gpu: the whole call on the CPU with the smallest sizes, what may go wrong in it, and the
scripts of training.
"""

import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from mod_export.data.text import default_texts
from mod_export.formats import adapter_files
from mod_export.formats.base_identity import gguf_identity
from mod_export.formats.gguf import GGUFFile
from mod_export.llamacpp import source as llama_source
from tests.support.short_smollm2 import short_smollm2

ROOT = Path(__file__).resolve().parents[2]
N_LAYER = 4


def in_scripts(code: str, **env) -> None:
    """Run Python code beside the scripts, in a process of its own."""
    paths = os.pathsep.join([str(ROOT / "scripts/gpu"), str(ROOT)])
    command = [sys.executable, "-c", code]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": paths} | env, cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package of the CPU build that the tests run on, with kv routers alone."""
    folder = tmp_path_factory.mktemp("package") / "prebuilt"
    in_scripts(
        "import model, prebuild, llama_cpp; from pathlib import Path; model.UNITS = ('kv',); "
        "lib = Path(llama_cpp.__file__).parent / 'lib'; "
        f"prebuild.pack(Path('{folder}'), [lib], packages=False)"
    )
    return folder


def call(out, package, *options, **env):
    """The command of a rehearsed call, and its environment."""
    command = [ROOT / "scripts/gpu/call", out, "--prebuilt", package, "--work", out.parent]
    return {
        "args": [*map(str, command), *options],
        "env": os.environ | {"PYTHON": sys.executable} | env,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


def read(path):
    return json.loads(path.read_text())


def test_whole_call(package, tmp_path):
    """Every part passes, has its results, and nothing stays behind."""
    out = tmp_path / "out"
    done = subprocess.run(**call(out, package, "--rehearse"))
    assert done.returncode == 0, done.stdout + done.stderr
    states = read(out / "call.json")["parts"]
    assert {state["state"] for state in states.values()} == {"passed"} and len(states) == 6
    decode = read(out / "decode.json")
    assert decode["left_out"] == 0 and not decode["failures"]
    assert len(decode["rows"]) == 2 * (7 + 2 * 5)  # contexts; half, then all and none
    kv = [row for row in decode["rows"] if row["lane"] == "kv" and row["context"] == 128]
    assert 0.2 < kv[0]["activation"] < 0.8 and kv[0]["perf"]["graphs"] == 1
    segments = [row for row in read(out / "sequences.json")["rows"] if row["lane"] == "attn"]
    assert segments[0]["perf"]["graphs"] > 2
    assert read(out / "profile.json")["stages"]["compute"] > 0
    assert {"all active / dense", "efficiency at half"} <= {
        figure["figure"] for figure in read(out / "call.json")["figures"]
    }
    assert "is that of this checkout" in done.stdout
    assert "none active / pruned" in done.stdout and "parity: 4 of 4 cases" in done.stdout
    in_scripts(f"import plots, sys; sys.argv[1:] = [{str(out)!r}]; plots.main()")
    assert {path.stem for path in out.glob("*.png")} == {"decode", "prefill", "sequences", "long"}
    assert len(list(out.iterdir())) == 12  # six parts, call.json, call.log and the plots
    assert not list(tmp_path.glob("gpu-call-*"))


def test_call_that_is_stopped(package, tmp_path):
    """What was measured before is whole and told of; no process and no model stay behind."""
    out = tmp_path / "out"
    process = subprocess.Popen(**call(out, package, "--rehearse", "--parts", "long,decode"))
    while not (out / "decode.json").is_file() and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 3 and "call: stopped" in said
    assert read(out / "call.json")["parts"]["long"]["state"] == "passed"
    assert len(read(out / "decode.json")["rows"]) < 34
    assert not list(tmp_path.glob("gpu-call-*"))
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in processes


def test_a_part_that_fails_and_models_that_do_not_fit(package, tmp_path):
    """The other parts run all the same."""
    other, out = tmp_path / "other", tmp_path / "out"
    (other / "content").mkdir(parents=True)
    run = {"check": True, "cwd": other}
    subprocess.run(["tar", "-xzf", package / "prebuilt.tar.gz", "-C", "content"], **run)
    (other / "content/model/kv.npz").unlink()
    subprocess.run(["tar", "-czf", "prebuilt.tar.gz", "-C", "content", "."], **run)
    sha256 = hashlib.sha256((other / "prebuilt.tar.gz").read_bytes()).hexdigest()
    about = read(package / "prebuilt.json") | {"sha256": sha256}
    (other / "prebuilt.json").write_text(json.dumps(about))
    command = call(out, other, "--rehearse", "--parts", "parity,long", MOD_REHEARSE_BYTES="1")
    done = subprocess.run(**command)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "kv.npz" in read(out / "parity.json")["cases"]["kv, segments"]["failures"][0]
    long = read(out / "long.json")
    assert not long["rows"] and "does not fit" in long["failures"]["dense"]
    assert "long: a check failed" in done.stdout
    in_scripts("import report, sys; sys.argv[1:] = [" + repr(str(out)) + "]; report.main()")


def test_a_call_that_cannot_begin(package, tmp_path):
    """One line says why, before anything is measured."""
    out, other, programs = tmp_path / "out", tmp_path / "other", tmp_path / "bin"
    shutil.copytree(package, other)
    programs.mkdir()
    smi = programs / "nvidia-smi"

    def refused(words, package=other):
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(**call(out, package, PATH=path))
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr, (
            done.stderr
        )
        assert not (out / "call.json").exists()

    refused("there is no package", tmp_path / "none")
    for said, words in (
        ("", "nvidia-smi names no GPU"),
        ("NVIDIA H100, 580.65.06, 9.0", "a CPU build"),
    ):
        smi.write_text(f"#!/bin/sh\necho '{said}'\n")
        smi.chmod(0o755)
        refused(words)
    about = read(other / "prebuilt.json") | {"cuda": [13, 0], "architecture": "90"}
    (other / "prebuilt.json").write_text(json.dumps(about))
    for said, words in (
        ("NVIDIA H100, 550.54.14, 9.0", "driver 550.54.14 is too old for CUDA 13"),
        ("NVIDIA GeForce RTX 4090, 580.65.06, 8.9", "the libraries are for 90"),
    ):
        smi.write_text(f"#!/bin/sh\necho '{said}'\n")
        refused(words)
    (other / "prebuilt.tar.gz").write_bytes(b"damaged")
    refused("is damaged")


def test_instances_are_each_compiled_or_a_stub(tmp_path):
    """Every instance that upstream declares is there once, and the stubs compile."""
    upstream = llama_source.source_dir() / llama_source.LLAMA_CPP / "ggml"
    instances = upstream / "src/ggml-cuda/template-instances"
    in_scripts(
        "import instances; from pathlib import Path; "
        f"instances.write(Path('{instances}'), Path('{tmp_path}'))"
    )

    def declared(paths):
        found = (re.findall(r"^DECL_.*;", path.read_text(), re.MULTILINE) for path in paths)
        return sorted(line for lines in found for line in lines)

    patterns = ("fattn-mma*.cu", "fattn-tile*.cu", "fattn-vec-instance-f16-f16.cu", "mmq*.cu")
    theirs = declared(path for pattern in patterns for path in instances.glob(pattern))
    assert declared(tmp_path.iterdir()) == theirs
    kept = declared(tmp_path.glob("*.cu"))
    assert "DECL_FATTN_MMA_F16_CASE(128, 128, 16, 4);" in kept and len(kept) < len(theirs) / 5
    command = [
        "c++",
        "-std=c++17",
        "-fsyntax-only",
        f"-I{upstream}/include",
        tmp_path / "stubs.cpp",
    ]
    subprocess.run(command, check=True)


def test_expectation(part):
    """What is expected follows the bytes: fewer active units and faster cards take less time."""
    expect, plans = part("expect"), part("plans")
    shape, plan = plans.preset_named("8b"), plans.PLANS["decode"]
    every = expect.weights(shape, expect.type_named("q4_0"))
    weights = sum(w.nbytes for w in every if w.name != "token_embd.weight")
    assert expect.step(plans.DENSE, plan, "none", 0).bytes == weights
    kv_bytes = 32 * 1000 * 2 * 2 * 1024  # layers, cells, K and V, f16, values
    assert expect.step(plans.DENSE, plan, "none", 1000).bytes == weights + kv_bytes
    for lane in plan.lanes:
        at = [expect.step(lane, plan, f, 32768).bytes for f in ("inactive", "none", "active")]
        assert at == sorted(at)
    h100, h200 = (expect.card_named(f"NVIDIA {name}") for name in ("H100 80GB HBM3", "H200"))
    at = plans.KV, plan, "none", 32768, 512
    assert expect.predict(*at, h100)["ms"] > expect.predict(*at, h200)["ms"]
    assert expect.card_named("Tesla T4") is None
    in_scripts(
        "import expect; from pathlib import Path; page = Path('docs/results/gpu.md').read_text(); "
        "assert all(line.rsplit('|', 2)[0] in page for line in expect.table().splitlines()[2:])",
        MOD_REHEARSE="0",
    )


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
    """Imports a part as the call would run it, in a rehearsal."""
    (tmp_path / "lib").mkdir()
    for name, value in {
        "MOD_REHEARSE": "1",
        "GPU_WORK": str(tmp_path),
        "GPU_OUT": str(tmp_path),
        "GPU_SECONDS": "60",
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
    """The speed of LoRA for a few layers, a training that it allows, and what came of it."""
    text = "\n\n".join(default_texts())
    work, out = tmp_path / "work", tmp_path / "out"
    (work / "data/dev").mkdir(parents=True)
    (work / "data/train.txt").write_text(text[:18000])
    (work / "data/dev/a.txt").write_text(text[-3000:])
    (work / "unpacked-pieces").touch()
    short_start(work)
    command = f"{ROOT}/scripts/gpu/train.sh {tmp_path}/pieces {work} {out}"
    env = {"PYTHON": sys.executable, "LENGTH": "264", "BATCH": "1", "COUNT": "1"}
    env |= {"TRAIN": "lora", "TOKENS": "528"}
    one_line(shell(command, PYTHON="/none"), "/none lacks torch")
    early = shell(command, **env | {"MINUTES": "0.01"})
    assert early.returncode == 1 and "time was up" in early.stdout
    assert read(out / "train.json")["failures"]["speed-lora"] == "time was up"
    result = shell(command, **env | {"MINUTES": "10"})
    assert result.returncode == 0, result.stdout + result.stderr
    found = read(out / "train.json")
    assert found["speed"]["lora"]["ratio"] > 0 and found["trained"]["lora"]["tokens"] == 528
    kl = {name: texts[0]["kl"] for name, texts in found["judged"].items()}
    assert set(kl) == {"start", "trained-lora"} and len(set(kl.values())) == 2
    assert "plain fine-tuning" in result.stdout and "trained-lora" in result.stdout


def test_without_a_gpu_nothing_is_compared(part, monkeypatch, capsys):
    common = part("common")
    monkeypatch.setattr(common, "REHEARSE", False)
    monkeypatch.setattr("mod_export.runtime.devices.gpus", list)
    with pytest.raises(SystemExit) as exit:
        common.part(lambda: True)
    assert exit.value.code == 2 and "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad", [None, "  MOD_MASK(n=1): FAIL", "  MOD_MASK(n=1): not supported [CUDA0]"]
)
def test_ops_reads_test_backend_ops(bad, part, tmp_path):
    ops = part("ops")
    lines = [f"  {op}(type=f32,n=1): \033[1;32mOK\033[0m" for op in ops.OPS.split(",")] + [
        bad or "  done"
    ]
    script = tmp_path / "lib/test-backend-ops"
    script.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    script.chmod(0o755)
    assert ops.main() is (bad is None)
    result = json.loads((tmp_path / "ops.json").read_text())
    assert result["passed"] is (bad is None) and result["cases"]["MOD_SCORE"] == 1
    assert (
        result["failed"] == ([bad.strip()] if bad else [])
        and result["machine"]["rehearsal"] is True
    )
    script.write_text("#!/bin/sh\n")
    assert ops.main() is False  # no case has run


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
