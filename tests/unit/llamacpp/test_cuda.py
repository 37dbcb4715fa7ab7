"""What a CUDA build and scripts/cuda/check.py look for and ask for.

There is no GPU, and nvcc is a script that only talks.
"""

import contextlib
import ctypes
import os
import subprocess
import sys
import zipfile
from importlib import machinery, util
from pathlib import Path

import pytest

from mod_export.common import paths
from mod_export.errors import UserError
from mod_export.llamacpp import build as llama_build
from mod_export.llamacpp import cuda as llama_cuda
from mod_export.llamacpp import source as llama_source

ROOT = Path(__file__).resolve().parents[3]
NVCC = """#!/bin/sh
case "$1" in
    --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
    --dryrun) echo "#$ TOP={root}/bin/.." >&2 ;;
    --list-gpu-arch) printf 'compute_75\\ncompute_86\\ncompute_120\\n' ;;
esac
"""


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose only part of CUDA is an nvcc, behind a script outside of its toolkit."""
    root = tmp_path / "toolkit"
    script(tmp_path / "bin/nvcc", NVCC.format(root=root, version="13.0"))
    for name in ("CUDACXX", "CUDA_PATH", "CUDA_HOME", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(llama_cuda, "DRIVER_DIRS", (str(tmp_path / "driver"),))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    return tmp_path


def package(machine, name="cu13", major=13):
    folder = machine / "site/nvidia" / name
    touch(
        folder / "include/cublas_v2.h",
        *(folder / f"lib/lib{lib}.so.{major}" for lib in ("cublas", "cublasLt")),
    )
    return folder


def test_no_nvcc(machine, monkeypatch):
    monkeypatch.setenv("CUDACXX", str(machine / "none/nvcc"))
    with pytest.raises(UserError, match="missing: .*none/nvcc; .*CUDACXX"):
        llama_cuda.find()


def test_all_that_is_missing_is_named_at_once(machine):
    with pytest.raises(UserError, match=r"cuBLAS.*libcuda.so.*pip install nvidia-cublas`.*driver"):
        llama_cuda.find().flags(["86"])


def test_cublas_of_a_package(machine):
    """As of nvidia-cublas: no libcublas.so, and cmake would not look there. The driver brings its
    library only.
    """
    folder = package(machine)
    touch(machine / "driver/libcuda.so.1", machine / "toolkit/lib64/libcudart.so")
    toolkit = llama_cuda.find()
    assert toolkit.version == (13, 0) and toolkit.root == machine / "toolkit"
    flags = toolkit.flags(["75", "86"])
    assert flags["CMAKE_CUDA_ARCHITECTURES"] == "75;86"
    assert flags["CMAKE_CUDA_FLAGS"] == f"-I{folder / 'include'}"
    assert flags["CUDA_cublas_LIBRARY"] == str(folder / "lib/libcublas.so.13")
    assert flags["CUDA_cublasLt_LIBRARY"] == str(folder / "lib/libcublasLt.so.13")
    assert flags["CUDA_cuda_driver_LIBRARY"] == str(machine / "driver/libcuda.so.1")
    assert flags["CMAKE_INSTALL_RPATH"] == f"$ORIGIN;{folder / 'lib'};{machine / 'toolkit/lib64'}"


def test_a_stub_of_the_driver_is_made(machine, monkeypatch):
    """As with the toolkit of NVIDIA's packages, on a machine without a driver."""
    monkeypatch.setenv("MOD_EXPORT_CACHE", str(machine / "cache"))
    package(machine)
    header = machine / "toolkit/targets/x86_64-linux/include/cuda.h"
    touch(header)
    header.write_text(
        "#define cuMemCreate cuMemCreate_v2\nCUresult CUDAAPI cuInit(unsigned int);\n"
    )
    stub = Path(llama_cuda.find().flags(["86"])["CUDA_cuda_driver_LIBRARY"])
    library = ctypes.CDLL(str(stub))
    assert library.cuInit and library.cuMemCreate_v2 and b"libcuda.so.1\0" in stub.read_bytes()
    assert llama_cuda.find().driver() == stub
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("MOD_EXPORT_CACHE", str(machine / "other"))
    assert llama_cuda.find().driver() is None


def test_tools_link_without_the_driver(machine, monkeypatch):
    """The stub's name is libcuda.so, and ggml-cuda asks for libcuda.so.1."""
    monkeypatch.setenv("MOD_EXPORT_CACHE", str(machine / "cache"))
    package(machine)
    touch(machine / "driver/libcuda.so")
    (machine / "cache/log").mkdir(parents=True)
    compiled = []
    monkeypatch.setattr(
        llama_build, "_compile", lambda source, lib, flags, *_: compiled.append(flags)
    )
    monkeypatch.setattr(llama_build, "missing_tools", lambda patching: {})
    monkeypatch.setattr(llama_build, "_lock", lambda name: contextlib.nullcontext())
    monkeypatch.setattr(llama_source, "source_dir", lambda *_: machine)
    for tools in (False, True):
        llama_build.build(cuda=True, tools=tools, cuda_arch="86", jobs=1)
    library, programs = (flags.get("CMAKE_EXE_LINKER_FLAGS", "") for flags in compiled)
    assert "--allow-shlib-undefined" in programs and not library


def test_the_toolkit_comes_first(machine):
    package(machine)
    lib = machine / "toolkit/targets/x86_64-linux/lib"
    touch(lib / "libcublas.so", lib / "libcublasLt.so", lib / "stubs/libcuda.so")
    touch(machine / "toolkit/targets/x86_64-linux/include/cublas_v2.h")
    flags = llama_cuda.find().flags(["86"])
    assert flags["CUDA_cublas_LIBRARY"] == str(lib / "libcublas.so")
    assert flags["CUDA_cuda_driver_LIBRARY"] == str(lib / "stubs/libcuda.so")


def test_a_package_for_another_cuda_is_passed_over(machine):
    package(machine, name="cublas", major=12)
    touch(machine / "driver/libcuda.so")
    with pytest.raises(UserError, match="missing: cuBLAS"):
        llama_cuda.find().flags(["86"])
    script(machine / "bin/nvcc", NVCC.format(root=machine / "toolkit", version="12.4"))
    flags = llama_cuda.find().flags(["86"])
    assert flags["CUDA_cublas_LIBRARY"] == str(machine / "site/nvidia/cublas/lib/libcublas.so.12")


def test_architectures(machine):
    toolkit = llama_cuda.find()
    assert toolkit.architectures("120, 75,75") == ["75", "120"]
    with pytest.raises(UserError, match="nvcc 13.0 has no architecture '61'; it has 75, 86, 120"):
        toolkit.architectures("75,61")
    script(machine / "bin/nvidia-smi", "#!/bin/sh\nexit 9\n")
    with pytest.raises(UserError, match="no GPU .*--cuda-arch 75,80,86,89,90,120"):
        toolkit.architectures()
    script(machine / "bin/nvidia-smi", "#!/bin/sh\nprintf '8.6\\n12.0\\n8.6\\n'\n")
    assert toolkit.architectures() == toolkit.architectures("native") == ["86", "120"]


def test_build_says_it_before_any_work(run_cli, machine):
    result = run_cli("build", "--cuda", CUDACXX=str(machine / "none/nvcc"), PATH=os.environ["PATH"])
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "missing:" in result.stderr and "CUDA toolkit" in result.stderr


def test_key_follows_architectures_and_nvcc(machine):
    package(machine)
    touch(machine / "driver/libcuda.so")

    def key(*archs):
        flags = llama_cuda.find().flags(list(archs)) if archs else {}
        return llama_build._key(llama_build.FLAGS | flags, None)

    keys = {key(), key("75"), key("86")}
    script(machine / "bin/nvcc", NVCC.format(root=machine / "toolkit", version="13.1"))
    keys.add(key("75"))
    assert len(keys) == 4


def cuda_check(*args, **env):
    command = [sys.executable, ROOT / "scripts/cuda/check.py", *args]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True)


def test_cuda_check_without_nvcc(tmp_path):
    result = cuda_check(CUDACXX=str(tmp_path / "nvcc"))
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "missing:" in result.stderr


def test_cuda_check_compiles_what_the_patches_touch(tmp_path):
    """With an nvcc that notes what it is asked for, and fails for one file."""
    fails = f'    *) echo "$@" >>{tmp_path}/log; case "$*" in *mod-rows.cu\\ *) exit 1 ;; esac ;;\n'
    talk = NVCC.format(root=tmp_path, version="13.0").replace("esac\n", f"{fails}esac\n")
    nvcc = script(tmp_path / "nvcc", talk)
    touch(tmp_path / "cublas/include/cublas_v2.h")
    result = cuda_check("--arch", "75,120", "--cublas", str(tmp_path / "cublas"), CUDACXX=str(nvcc))
    assert result.returncode == 1, result.stderr
    said = {line.split()[0]: line.split()[1] for line in result.stdout.splitlines()[1:]}
    assert said["mod-rows.cu"] == "failed" and set(said.values()) == {"ok", "failed"}
    assert {"ggml-cuda.cu", "mod-route.cu", "mod-route.cuh"} <= set(
        said
    ) and "common.cuh" not in said
    assert all(
        "code=sm_75" in line and "code=sm_120a" in line
        for line in (tmp_path / "log").read_text().splitlines()
    )
    result = cuda_check("acc.cu", CUDACXX=str(nvcc))
    assert result.returncode == 2 and "not among the touched files: acc.cu" in result.stderr


@pytest.fixture
def checker(machine, monkeypatch):
    """scripts/cuda/check.py as a module.

    The source tree has one file, and nvcc counts its calls.
    """
    loader = machinery.SourceFileLoader("cuda_check", str(ROOT / "scripts/cuda/check.py"))
    module = util.module_from_spec(util.spec_from_loader("cuda_check", loader))
    loader.exec_module(module)
    monkeypatch.setattr(llama_source, "source_dir", lambda: machine / "source")
    monkeypatch.setattr(paths, "cache_dir", lambda: machine / "cache")
    touch(
        machine / "source/vendor/llama.cpp" / module.FOLDER / "mod.cu",
        machine / "cublas/include/cublas_v2.h",
    )
    (machine / "cache").mkdir()
    counts = f"    *) echo x >>{machine}/log; exit $(cat {machine}/code 2>/dev/null || echo 0) ;;\n"
    counts += "esac\n"
    script(
        machine / "bin/nvcc",
        NVCC.format(root=machine / "toolkit", version="13.0").replace("esac\n", counts),
    )
    return module


def test_cuda_check_compiles_once_what_does_not_change(checker, machine):
    def compiled(cached=True):
        (machine / "log").write_text("")
        failed = checker.check(["mod.cu"], "75", machine / "cublas", cached, fetch=False)
        return failed, len((machine / "log").read_text().split())

    (machine / "code").write_text("1")
    assert compiled() == (1, 1)  # what fails is tried again
    (machine / "code").unlink()
    assert [compiled(), compiled(), compiled(cached=False)] == [(0, 1), (0, 0), (0, 1)]
    (machine / "source/vendor/llama.cpp/ggml/src/ggml-cuda/common.cuh").write_text("// a header")
    assert compiled() == (0, 1)


def test_cuda_check_takes_headers_out_of_the_package(checker, machine, monkeypatch):
    def pip(command, **_):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1], "x.whl"), "w") as wheel:
            for name in ("nvidia/cu13/include/cublas_v2.h", "nvidia/cu13/lib/libcublas.so.13"):
                wheel.writestr(name, "")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(checker.subprocess, "run", pip)
    include = checker.fetch_cublas()
    assert [path.name for path in include.iterdir()] == [
        "cublas_v2.h"
    ] and include.parent.parent == machine / "cache"
    assert len(list((machine / "cache").iterdir())) == 1
    monkeypatch.setattr(checker, "CUBLAS_VERSION", "0")
    failed = subprocess.CompletedProcess([], 1, "", "no network\n")
    monkeypatch.setattr(checker.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="cannot fetch nvidia-cublas 0: no network"):
        checker.fetch_cublas()
    assert len(list((machine / "cache").iterdir())) == 1
