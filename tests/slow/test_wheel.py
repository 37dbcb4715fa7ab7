"""The wheel works in an environment of its own: no checkout, and none of the optional packages."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import mod_export
from mod_export.llamacpp import build as llama_build
from mod_export.llamacpp import source as llama_source

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("LICENSE", "README.md", "mod_export", "patches", "pyproject.toml")
# The environment of the wheel shares what the tests run with, except for the package, the runtime
# that `mod-export build` installs, and the packages of the extras.
NOT_SHARED = ("mod_export", "__editable__", "llama_cpp", "matplotlib", "peft")

pytest.importorskip("build", reason="needs the package build")


def files_below(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout, dist = folder / "checkout", folder / "dist"
    checkout.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, checkout / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, checkout]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel


def test_wheel_has_every_file_of_the_package_and_the_patches(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {f"mod_export/{name}" for name in files_below(ROOT / "mod_export")}
    patches = {f"mod_export/patches/{name}" for name in files_below(ROOT / "patches")}
    assert found == package | patches


def test_sdist_has_every_file_of_the_package_and_the_patches(archives):
    with tarfile.open(archives[0]) as sdist:
        found = {
            name.partition("/")[2]
            for name in sdist.getnames()
            if name.partition("/")[2].startswith(("mod_export/", "patches/"))
            and sdist.getmember(name).isfile()
        }
    expected = {
        f"{folder}/{name}"
        for folder in ("mod_export", "patches")
        for name in files_below(ROOT / folder)
    }
    assert found == expected


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """installed(*command) -> CompletedProcess in a virtual environment that has the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    env, shared, work = folder / "env", folder / "shared", folder / "work"
    shared.mkdir()
    work.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(NOT_SHARED) and path.suffix != ".pth":
            (shared / path.name).symlink_to(path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    [site] = env.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text(f"{shared}\n")
    pip = [env / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.pop("LLAMA_CPP_LIB_PATH", None)
    done = subprocess.run([*pip, archives[1]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def run(*command):
        command = [env / "bin" / command[0], *command[1:]]
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)

    return run


def test_the_installed_package_converts_exports_and_answers(installed):
    done = installed("python", "-c", "import mod_export; print(mod_export.__file__)")
    assert "/installed" in done.stdout and str(ROOT) not in done.stdout, done.stderr
    for name in ("matplotlib", "peft", "llama_cpp"):
        assert installed("python", "-c", f"import {name}").returncode == 1
    done = installed("mod-export", "--version")
    assert mod_export.__version__ in done.stdout, done.stderr

    lib = llama_build.patched_lib()
    code = "from mod_export.llamacpp import source; print(source.patches_digest())"
    assert installed("python", "-c", code).stdout.strip() == llama_source.patches_digest()
    done = installed("mod-export", "build")
    assert done.returncode == 0, done.stderr
    assert str(lib) in done.stdout + done.stderr, "it was built already"
    base = ["--base", "smollm2", "-o", "mod.gguf"]
    done = installed("mod-export", "export", "smollm2-kv", *base)
    assert done.returncode == 0, done.stderr
    prompt = ["--prompt", "What is the capital of France?"]
    done = installed(
        "mod-export", "chat", "mod.gguf", *prompt, "--temperature", "0", "--max-tokens", "12"
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert "activation 0." in done.stderr
