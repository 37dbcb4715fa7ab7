"""The patches and the script that makes an edited tree of them and back. Nothing is compiled."""

import importlib.util
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from mod_export.errors import UserError
from mod_export.llamacpp import source as llama_source

ROOT = Path(__file__).resolve().parents[3]
HEADER = (
    "Description: build : a line\nAuthor: test\nForwarded: not-needed\nLast-Update: 2026-11-22\n"
)
MOST_ADDED_LINES = 260  # of all patches together


@pytest.fixture
def refresh(tmp_path):
    """The script as a module, working on a copy of patches/."""
    spec = importlib.util.spec_from_file_location(
        "refresh_patches", ROOT / "scripts/patches/refresh.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PATCHES = tmp_path / "patches"
    shutil.copytree(ROOT / "patches", module.PATCHES)
    return module


def git(tree, *args):
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *identity, *args], cwd=tree, check=True, capture_output=True)


def test_round_trip(refresh):
    refresh.check()


def test_overlay_replaces_nothing():
    """A file of upstream's is changed by a patch, where one sees what changes; an overlay file is
    new.
    """
    pin = llama_source.read_pin()
    with tarfile.open(llama_source.fetch_sdist()) as archive:
        root = f"llama_cpp_python-{pin.version}/vendor/llama.cpp"
        upstream = {name.removeprefix(root + "/") for name in archive.getnames()}
    assert "src/llama.cpp" in upstream
    assert not upstream & {str(name) for name in llama_source.overlay_files()}


def test_upstreams_files_gain_few_lines():
    """What is ours lies in files of our own: upstream's change with every bump."""
    patches = [path.read_text(encoding="utf-8") for path in llama_source.read_series()]
    added = [len(re.findall(r"^\+(?!\+\+ b/)", text, flags=re.MULTILINE)) for text in patches]
    assert 0 < sum(added) <= MOST_ADDED_LINES, added


def test_the_library_does_not_depend_on_the_tools(monkeypatch, tmp_path):
    """A change to the server alone must build the server alone."""
    patches = shutil.copytree(ROOT / "patches", tmp_path / "patches")
    monkeypatch.setattr(llama_source, "patches_dir", lambda: patches)
    library, tools = (llama_source.patches_digest(tools=with_) for with_ in (False, True))
    assert library != tools
    [server] = patches.glob("*-server-mod.patch")
    for path in (server, patches / "overlay/tools/server/server-mod.cpp"):
        path.write_text(path.read_text() + "\n")
        assert llama_source.patches_digest() == library
        assert llama_source.patches_digest(tools=True) != tools
        tools = llama_source.patches_digest(tools=True)
    header = patches / "overlay/include/llama-mod.h"
    header.write_text(header.read_text() + "\n")
    assert llama_source.patches_digest() != library


@pytest.mark.parametrize("stock", [False, True])
def test_a_source_that_lacks_files_is_unpacked_again(monkeypatch, stock):
    """The tools need files that older versions did not unpack: cmake failed on their source."""
    before = llama_source._source_path(stock)
    assert before == llama_source._source_path(stock)
    monkeypatch.setattr(llama_source, "USED_FILES", llama_source.USED_FILES | {"vendor/x"})
    assert llama_source._source_path(stock) != before


def test_check_finds_other_bytes(refresh):
    """A file that the round trip would lose must not pass."""
    (refresh.PATCHES / "9999-not-in-series.patch").write_text(HEADER + "---\n")
    with pytest.raises(UserError, match="9999-not-in-series.patch changes"):
        refresh.check()


def test_edits_return_to_overlay_and_patches(refresh, tmp_path):
    tree = tmp_path / "tree"
    refresh.create(tree, only=refresh.touched(refresh.PATCHES) | {"Makefile"})
    makefile = tree / "Makefile"
    makefile.write_text(makefile.read_text() + "# one\n")
    with pytest.raises(UserError, match="no patch changes Makefile"):
        refresh.fold(tree)
    git(tree, "commit", "--quiet", "--all", "--message", f"makefile-note\n\n{HEADER}")

    makefile.write_text(makefile.read_text() + "# two\n")
    (tree / "src").mkdir(exist_ok=True)
    (tree / "src/our-new-file.cpp").write_text("// no newline at the end")
    with pytest.raises(UserError, match="uncommitted"):
        refresh.write(tree, refresh.PATCHES)
    refresh.fold(tree)
    refresh.write(tree, refresh.PATCHES)

    [patch] = refresh.PATCHES.glob("*-makefile-note.patch")
    assert patch.read_text().startswith(f"{HEADER}---\ndiff --git a/Makefile b/Makefile\n")
    assert "+# one\n+# two\n" in patch.read_text()
    assert (
        refresh.PATCHES / "overlay/src/our-new-file.cpp"
    ).read_text() == "// no newline at the end"
    refresh.check()


@pytest.mark.parametrize("field", ["Description", "Author", "Forwarded", "Last-Update"])
def test_headers_are_complete(refresh, field):
    lines = [line for line in HEADER.splitlines(keepends=True) if not line.startswith(field)]
    with pytest.raises(UserError, match=f"no {field}"):
        refresh.check_header("x.patch", "".join(lines))


@pytest.mark.parametrize(
    "bad", ["Last-Update: yesterday\n", "Forwarded: no\n", "Description: no module\n", "Bug: 1\n"]
)
def test_header_values(refresh, bad):
    lines = [
        line for line in HEADER.splitlines(keepends=True) if not line.startswith(bad.split(":")[0])
    ]
    with pytest.raises(UserError):
        refresh.check_header("x.patch", "".join(lines) + bad)
