"""The command line: help is fast and imports nothing heavy, and errors are one line."""

import statistics
import subprocess
import sys
import time

import pytest

from mod_export.cli import COMMANDS


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
