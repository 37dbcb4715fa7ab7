"""What a shell hands on: bytes that are no UTF-8, closed streams, places that are missing."""

import contextlib
import os
import pwd
import resource
import subprocess
import sys

import click
import pytest

from mod_export.cli import COMMANDS, cli
from mod_export.cli.values import FileName, Text
from mod_export.common.files import atomic_file
from mod_export.common.journal import Journal
from mod_export.common.paths import cache_dir
from mod_export.common.text import decode_argument, decode_text
from mod_export.data import sources, token_cache
from mod_export.errors import UserError
from tests.support.byte_tokenizer import byte_tokenizer

BAD = os.fsdecode(b"caf\xe9")


def parameters(kind) -> list:
    found = [
        pytest.param(parameter, id=f"{name} {parameter.name}")
        for name in COMMANDS
        for parameter in cli.get_command(None, name).params
        if isinstance(parameter.type, kind)
    ]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("parameter", parameters(click.Path))
def test_a_name_that_is_no_utf8_is_refused(parameter):
    assert isinstance(parameter.type, FileName)
    with pytest.raises(UserError, match=r"the name b'caf\\xe9' is no UTF-8; rename the file"):
        parameter.type.convert(BAD, parameter, None)


@pytest.mark.parametrize("parameter", parameters(click.types.StringParamType))
def test_a_text_is_read_as_stdin_is(parameter):
    assert isinstance(parameter.type, Text)
    assert parameter.type.convert(BAD, parameter, None) == decode_text(b"caf\xe9") == "caf\ufffd"


@pytest.mark.parametrize("command", ["inspect", "export", "convert", "chat", "synth"])
def test_the_refusal_is_one_line(run_cli, command):
    output = ["-o", "x"] if command in ("export", "convert", "synth") else []
    result = run_cli(command, BAD, *output)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: the name b'caf\\xe9' is no UTF-8; rename the file\n"


def test_text_of_bytes():
    assert decode_text(b"\xef\xbb\xbfone\r\ntwo\rthree\x00\xff") == "one\ntwo\nthree\x00\ufffd"
    assert decode_argument("café 東京 🏠") == "café 東京 🏠"


def test_names_inside_directories_do_no_harm(tmp_path):
    """The files of a folder may have any names; a message about one is printed as it can be."""
    (tmp_path / f"{BAD}.txt").write_text("A lighthouse.")
    (tmp_path / f"{BAD}.jsonl").write_text("no JSON")
    broken, good = sources.find([tmp_path])
    assert [piece.text for piece in sources.read(good)] == ["A lighthouse."]
    with pytest.raises(UserError, match="no JSON"):
        list(sources.read(broken))


def python(code: str, *redirections: str, **environment) -> subprocess.CompletedProcess:
    """Run code in a process of its own, which bash starts with these redirections."""
    return subprocess.run(
        ["bash", "-c", " ".join(['"$0" -c "$1"', *redirections]), sys.executable, code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_output_takes_any_text():
    code = "from mod_export.cli import open_streams; open_streams(); print('caf\\xe9 \\udce9')"
    result = python(code, PYTHONIOENCODING="ascii")
    assert (result.stdout, result.stderr) == ("caf\\xe9 \\udce9\n", "")


def test_a_closed_stream_is_no_output_file(tmp_path):
    """The first file that is opened must not become stdout: it would get what is printed."""
    code = f"""
import os, sys
from mod_export.cli import open_streams
open_streams()
with open({str(tmp_path / "out")!r}, "wb", buffering=0) as file:
    os.write(1, b"for a terminal")
    print("for a terminal", sys.stdin.read(), flush=True)
    file.write(b"whole")
"""
    result = python(code, "<&-", ">&-")
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "out").read_bytes() == b"whole"


def test_a_user_without_a_home(monkeypatch):
    def unknown(_uid):
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME", "MOD_EXPORT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UserError, match="no home directory for the cache; set MOD_EXPORT_CACHE"):
        cache_dir()


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOD_EXPORT_CACHE", str(tmp_path / "file"))
    for use in (cache_dir, lambda: cache_dir("tokens")):
        with pytest.raises(UserError, match="set MOD_EXPORT_CACHE"):
            use()


def test_a_cache_that_may_only_be_read(tmp_path, monkeypatch):
    """What is in it serves; what is not there is refused with the cure."""
    tokenizer = byte_tokenizer()
    text = tmp_path / "text.txt"
    text.write_text("A lighthouse.")
    monkeypatch.setenv("MOD_EXPORT_CACHE", str(tmp_path / "cache"))
    made = token_cache.tokens_of(tokenizer, [text])
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert token_cache.tokens_of(tokenizer, [text]) == made
    text.write_text("Another.")
    with pytest.raises(UserError, match="cannot write to the cache .*; set MOD_EXPORT_CACHE"):
        token_cache.tokens_of(tokenizer, [text])


@contextlib.contextmanager
def room_for(size: int):
    """Let files have this size at most, as on a disk that is full."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_a_full_disk(tmp_path):
    with room_for(0), pytest.raises(UserError, match="cannot write .*out.partial: File too large"):
        Journal(tmp_path / "out", {"seed": 1})
    assert list(tmp_path.iterdir()) == []
    with Journal(tmp_path / "out", {"seed": 1}) as journal:
        journal.add({"id": 0})
        with room_for(30), pytest.raises(UserError, match="make room; the same command goes on"):
            journal.add({"id": 1, "text": 30 * "a"})
    with Journal(tmp_path / "out", {"seed": 1}) as journal:
        assert journal.count == 1
        journal.done()
    with (
        room_for(10),
        pytest.raises(UserError, match="cannot write .*out: File too large; choose another output"),
        atomic_file(tmp_path / "out") as tmp,
    ):
        tmp.write_bytes(bytes(20))
    assert list(tmp_path.iterdir()) == []
