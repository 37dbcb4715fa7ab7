"""pyproject.toml names every package; tests/slow/test_wheel.py builds and installs the wheel."""

import tomllib
from pathlib import Path

import mod_export

ROOT = Path(__file__).resolve().parents[2]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for path in (ROOT / "mod_export").rglob("*.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    listed = project()["tool"]["setuptools"]["packages"]
    assert listed == sorted(found | {"mod_export.patches"})
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_every_other_file_is_data_of_the_package():
    package = ROOT / "mod_export"
    patterns = project()["tool"]["setuptools"]["package-data"]["mod_export"]
    data = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    files = {path for path in package.rglob("*") if path.is_file()}
    compiled = {path for path in files if path.suffix in (".py", ".pyc")}
    assert data == files - compiled


def test_constraints_have_every_requirement():
    """The set-up installs versions that the tests have run with."""
    lines = (ROOT / "scripts/constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if not line.startswith("#")}
    data = project()["project"]
    extras = data["optional-dependencies"]
    wanted = [*data["dependencies"], *extras["test"], *extras["train"], *extras["plots"]]
    wanted += [*extras["dev"], *extras["lm-eval"]]
    names = {name.partition(">=")[0].partition("==")[0].partition("[")[0] for name in wanted}
    # `mod-export build` makes llama-cpp-python; mod_export names its own extras
    assert names - {"llama-cpp-python", "mod_export"} <= pinned


def test_version():
    assert mod_export.__version__ == "0.2.0"
