"""`mod-export build` without compiling llama.cpp: what it names as missing, what it refuses, what
it installs.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mod_export.common import paths
from mod_export.errors import UserError
from mod_export.formats import hub
from mod_export.llamacpp import build as llama_build
from mod_export.llamacpp import source as llama_source
from mod_export.llamacpp import wheel as llama_wheel
from tests.support.oracle import make

SYMBOL = b"llama_mod_n_units"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, but for the source distribution of the real one."""
    sdist = llama_source.fetch_sdist()
    monkeypatch.setenv("MOD_EXPORT_CACHE", str(tmp_path / "cache"))
    (paths.cache_dir() / sdist.name).symlink_to(sdist)
    return paths.cache_dir()


@pytest.fixture
def patches(tmp_path, monkeypatch):
    """A copy of patches/ to break."""
    copy = tmp_path / "patches"
    shutil.copytree(llama_source.patches_dir(), copy)
    monkeypatch.setattr(llama_source, "patches_dir", lambda: copy)
    return copy


def test_the_runtime_is_the_patched_one():
    """Without the patched library in the environment most tests would test something else."""
    version = importlib.metadata.version("llama-cpp-python")
    assert version == f"{llama_source.read_pin().version}+mod", "run `mod-export build`"
    assert llama_build.installed_build() == llama_build.patched_lib().name, "run `mod-export build`"


@pytest.mark.parametrize("command", ["build", "serve"])
def test_missing_tools_are_named_at_once(tmp_path, command):
    """`serve` builds the tools where they are missing."""
    file = [hub.embedded_gguf()] if command == "serve" else []
    for name in ("git", "ninja"):
        (tmp_path / name).symlink_to(shutil.which("true"))
    (tmp_path / "python").symlink_to(sys.executable)
    # a Python whose folder holds no cmake either
    words = [tmp_path / "python", "-m", "mod_export", command, *file]
    env = os.environ | {
        "PATH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CC": "",
        "CXX": "",
        "MOD_EXPORT_CACHE": str(tmp_path / "cache"),
    }
    env.pop("LLAMA_CPP_LIB_PATH", None)  # its folder may hold the tools
    result = subprocess.run(words, env=env, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert (
        "cmake" in result.stderr
        and "a C++ compiler" in result.stderr
        and "apt-get install" in result.stderr
    )
    assert "git" not in result.stderr.split(";")[0]


def test_another_sdist_is_refused(run_cli, tmp_path, cache):
    (tmp_path / "other.tar.gz").write_bytes(b"other")
    result = run_cli("build", "--force", "--sdist", tmp_path / "other.tar.gz")
    assert result.returncode == 2 and "SHA-256" in result.stderr and result.stderr.count("\n") == 1
    assert not (cache / "source").exists() or not list((cache / "source").iterdir())


def test_no_network_is_named(run_cli, tmp_path):
    """pip asked for an index that is not there."""
    env = {
        "MOD_EXPORT_CACHE": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
    }
    env |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_RETRIES": "0"}
    result = run_cli("build", **env)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "pip could not fetch llama-cpp-python" in result.stderr and "network" in result.stderr


def test_source_is_patched(cache):
    source = llama_source.source_dir()
    assert (source / "vendor/llama.cpp/include/llama-mod.h").is_file()
    names = {path.name for path in (cache / "source").iterdir()}
    stock = llama_source.source_dir(stock=True)
    assert not (stock / "vendor/llama.cpp/include/llama-mod.h").exists()
    assert {path.name for path in (cache / "source").iterdir()} == names | {stock.name}


def test_a_patch_that_does_not_fit(cache, patches):
    first = llama_source.read_series()[0]
    text = first.read_text()
    header, _, diff = text.partition("---\n")
    context = next(line for line in diff.splitlines() if line.startswith(" ") and line.strip())
    first.write_text(f"{header}---\n{diff.replace(context, ' no such line in upstream')}")
    with pytest.raises(UserError, match=f"{first.name} does not apply"):
        llama_source.source_dir()
    assert not list((cache / "source").iterdir())


def test_a_failed_build_tells_its_error_and_keeps_the_log(cache, patches):
    """Broken by an error in a file that compiles early."""
    (patches / "overlay/ggml/src").mkdir(parents=True, exist_ok=True)
    for name in (
        "ggml.c",
        "ggml-alloc.c",
        "ggml-quants.c",
        "ggml-backend.cpp",
        "gguf.cpp",
        "ggml-threading.cpp",
    ):
        (patches / "overlay/ggml/src" / name).write_text("#error this build is meant to fail\n")
    with pytest.raises(UserError) as caught:
        llama_build.build(jobs=1)
    assert "error: #error this build is meant to fail" in str(caught.value)
    log = Path(caught.value.cure.removeprefix("see "))
    assert log.is_file() and log.parent == cache / "log"
    assert not (cache / "lib").exists() or not list((cache / "lib").iterdir())


def test_key_follows_patches_flags_and_compiler(patches, monkeypatch):
    flags = dict(llama_build.FLAGS)
    key, stock = (
        llama_build._key(flags, llama_source.patches_digest()),
        llama_build._key(flags, None),
    )
    assert key == llama_build._key(flags, llama_source.patches_digest()) != stock
    assert llama_build._key(flags | {"GGML_CUDA": "ON"}, llama_source.patches_digest()) != key
    header = patches / "overlay/include/llama-mod.h"
    header.write_text(header.read_text() + "\n")
    assert llama_build._key(flags, llama_source.patches_digest()) != key
    assert llama_build._key(flags, None) == stock
    for variable in ("CFLAGS", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS", "CXX"):
        with monkeypatch.context() as environment:
            environment.setenv(variable, "clang++-of-another-day")
            assert llama_build._key(flags, None) != stock, variable


def test_a_library_of_other_patches_says_so(tmp_path):
    """As after an upgrade of the package, without `mod-export build`."""
    file = make("kv").write(tmp_path / "mod.gguf")
    lib = shutil.copytree(llama_build.patched_lib(), tmp_path / "lib")
    code = (
        "import logging, sys; logging.basicConfig(); from mod_export.runtime import MoDLlama\n"
        "MoDLlama(sys.argv[1], n_ctx=64).close(); MoDLlama(sys.argv[1], n_ctx=64).close()"
    )
    said = []
    for patches in (None, "of another day"):
        if patches:
            about = json.loads((lib / llama_build.MARKER).read_text()) | {"patches": patches}
            (lib / llama_build.MARKER).write_text(json.dumps(about))
        result = subprocess.run(
            [sys.executable, "-c", code, file],
            env=os.environ | {"LLAMA_CPP_LIB_PATH": str(lib), "LD_LIBRARY_PATH": str(lib)},
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(result.stderr.count("built from other patches"))
    assert said == [0, 1]


def test_wheel(tmp_path):
    """pip takes it for the pinned requirement, and its library has our symbols."""
    lib = llama_build.patched_lib()
    wheel = llama_wheel.write_wheel(llama_source.source_dir(), lib, "0.3.36+mod", tmp_path)
    target = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        target,
    ]
    subprocess.run([*pip, wheel], check=True, capture_output=True)
    [found] = importlib.metadata.distributions(name="llama-cpp-python", path=[str(target)])
    assert found.version == "0.3.36+mod"
    assert {"typing-extensions>=4.5.0", "diskcache>=5.6.1"} <= set(found.requires)
    assert all(
        file.locate().stat().st_size == file.size for file in found.files if file.size is not None
    )
    assert SYMBOL in (target / "llama_cpp/lib/libllama.so").read_bytes()
    theirs = llama_source.source_dir() / "llama_cpp"
    for path in theirs.rglob("*.py"):
        assert (target / "llama_cpp" / path.relative_to(theirs)).is_file(), path
    marker = json.loads((target / "llama_cpp/lib" / llama_build.MARKER).read_text())
    assert marker["name"] == lib.name
    code = "import llama_cpp; print(llama_cpp.__version__)"
    env = os.environ | {"PYTHONPATH": str(target)}
    env.pop("LLAMA_CPP_LIB_PATH", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "0.3.36+mod\n", done.stderr


def test_pip_is_content_with_the_patched_version(tmp_path):
    pin = f"llama-cpp-python=={llama_source.read_pin().version}"
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", pin]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0 and "Would install" not in done.stdout, done.stdout + done.stderr


def test_stock_library_has_no_routers():
    lib = llama_build.stock_lib()
    if lib is None:
        pytest.skip("needs the stock library: run `mod-export build --stock`")
    assert SYMBOL not in (lib / "libllama.so").read_bytes()
