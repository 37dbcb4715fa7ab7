"""The command line: help is fast and imports nothing heavy, errors are one line, outputs appear
whole or not at all.
"""

import os
import statistics
import subprocess
import sys
import time

import pytest

from mod_export.cli import COMMANDS
from mod_export.common.files import atomic_dir, atomic_file
from mod_export.common.tables import format_table
from mod_export.errors import UserError


def one_error_line(result) -> str:
    assert result.returncode == 2, result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""
    return result.stderr


def test_help_is_fast(spawn_cli):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        result = spawn_cli("--help")
        times.append(time.perf_counter() - start)
    assert all(name in result.stdout for name in COMMANDS)
    assert statistics.median(times) < 0.5, times


def test_help_imports_nothing_heavy():
    code = "import sys; from mod_export.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers', 'llama_cpp', 'matplotlib', 'numpy', 'gguf'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run_cli, command):
    result = run_cli(command, "--help")
    assert result.returncode == 0, result.stderr
    assert f"mod-export {command}" in result.stdout


def test_without_a_command_help_is_shown(run_cli):
    result = run_cli()
    assert result.returncode == 0 and "Commands:" in result.stdout


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["--nonsense"],
        ["export"],
        ["export", "x"],
        ["build", "-j", "0"],
        ["chat", "x", "--temp", "nan"],
        ["synth", "135m", "-o", "x", "--rope-base", "inf"],
    ],
)
def test_usage_errors(run_cli, args):
    assert "--help" in one_error_line(run_cli(*args))


def test_missing_file(run_cli, tmp_path):
    assert "no such file" in one_error_line(run_cli("inspect", tmp_path / "none.gguf"))
    assert "is a directory" in one_error_line(run_cli("inspect", tmp_path))
    assert "no such file" in one_error_line(run_cli("build", "--sdist", tmp_path / "none.tar.gz"))


def test_interrupt_is_130():
    code = "import signal, os, click; from mod_export import cli\n"
    code += "@cli.cli.command()\ndef stop(): os.kill(os.getpid(), signal.SIGINT)\n"
    code += "cli.LazyGroup.get_command = lambda self, ctx, name: stop\ncli.main(['stop'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr.strip()) == (130, "error: interrupted")


def test_closed_output_is_no_error():
    result = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m mod_export --help | true"], capture_output=True
    )
    assert (result.returncode, result.stderr) == (0, b"")


def test_atomic_file(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic_file(target) as tmp:
        tmp.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_file(target) as tmp:
        tmp.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    with pytest.raises(UserError, match="--force"), atomic_file(target):
        pass
    with pytest.raises(RuntimeError), atomic_file(target, force=True) as tmp:
        raise RuntimeError
    assert target.read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_atomic_dir(tmp_path):
    target = tmp_path / "out"
    for text in ("first", "second"):
        with atomic_dir(target, force=True) as tmp:
            (tmp / "config.json").write_text(text)
            (tmp / "config.json").chmod(0o600)
    assert (target / "config.json").read_text() == "second"
    assert target.stat().st_mode & 0o666 == (target / "config.json").stat().st_mode & 0o777
    with pytest.raises(RuntimeError), atomic_dir(target, force=True) as tmp:
        raise RuntimeError
    assert (target / "config.json").read_text() == "second" and list(tmp_path.iterdir()) == [target]


def test_force_spares_other_directories_and_devices(tmp_path):
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(UserError, match="not replaced"), atomic_dir(tmp_path, force=True):
        pass
    with pytest.raises(UserError, match="regular file"), atomic_file(os.devnull, force=True):
        pass
    assert (tmp_path / "letters").read_text() == "dear"


def test_outputs_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="no directory"), atomic_file(tmp_path / "none" / "out"):
        pass
    with pytest.raises(UserError, match="cannot write"), atomic_file("/proc/self/out"):
        pass


def test_tables():
    rows = [["kv", 0.51234, 3], ["attn", None, 12]]
    plain = format_table(["kind", "share", "units"], rows).splitlines()
    assert plain == [
        "kind   share  units",
        "----  ------  -----",
        "kv    0.5123      3",
        "attn       -     12",
    ]
    assert (
        format_table(["kind", "share", "units"], rows, markdown=True).splitlines()[1]
        == "|------|-------:|------:|"
    )
