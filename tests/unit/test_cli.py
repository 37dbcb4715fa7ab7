"""The command line: help is fast and imports nothing heavy, and errors are one line."""

import logging
import os
import re
import statistics
import subprocess
import sys

import click
import pytest

import mod_export
from mod_export import __version__
from mod_export.cli import COMMANDS, cli, main
from mod_export.cli.output import hide_messages, show_messages
from mod_export.common.plots import check_folder
from mod_export.errors import UserError
from mod_export.llamacpp import build


def one_error_line(result) -> str:
    assert result.returncode == 2, result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""
    return result.stderr


def test_help_is_fast(spawn_cli):
    """In processor time, which other work on the machine does not change."""
    times = []
    for _ in range(5):
        before = os.times()
        result = spawn_cli("--help")
        after = os.times()
        user = after.children_user - before.children_user
        times.append(user + after.children_system - before.children_system)
    assert all(name in result.stdout for name in COMMANDS)
    assert statistics.median(times) < 0.3, times


def test_help_imports_nothing_heavy():
    heavy = ["torch", "transformers", "llama_cpp", "matplotlib", "numpy", "gguf", "tqdm", "psutil"]
    code = "import sys; from mod_export.cli import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: pass\n"
    code += f"print(sorted(set({heavy}) & set(sys.modules)))"
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
        ["chat", "x", "--temperature", "nan"],
        ["chat", "x", "--threshold-shift", "nan"],
        ["serve", "x", "--threshold-shift", "inf"],
        ["eval", "x", "--threshold-shift", "nan"],
        ["trace", "x", "-o", "x.png", "--threshold-shift=-inf"],
        ["bench", "x", "--dense", "x", "--threshold-shift", "0,nan"],
        ["convert", "x", "-o", "x", "--target-activation", "kv=nan"],
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


# Options that had another spelling: what users have in their scripts still works.
FORMER = {
    ("convert", "--layers"): ("layers_routed", "--layers-routed"),
    ("train", "--steady"): ("drift_penalty", "--drift-penalty"),
    ("chat", "--temp"): ("temperature", "--temperature"),
    ("bench", "--kv-types"): ("kv_types", "--kv-type"),
    ("generate-data", "--out"): ("output", "--output"),
    ("synth", "--activation"): ("activation", "--target-activation"),
    ("synth", "--sinks"): ("sink_tokens", "--sink-tokens"),
}


@pytest.mark.parametrize(("command", "former"), FORMER)
def test_former_spellings_work_and_are_hidden(command, former):
    name, spelling = FORMER[command, former]
    context = click.Context(cli, info_name="mod-export")
    found = cli.get_command(context, command)
    context = click.Context(found, info_name=command, parent=context)
    for option in (former, spelling):
        values, _, _ = found.make_parser(context).parse_args([option, "1"])
        assert values[name] == "1"
    words = found.get_help(context).split()
    assert spelling in " ".join(words) and former not in words and f"{former}," not in words


# llama.cpp's spelling of an option -> the commands that have it.
ALIASES = {
    "-c": ("chat", "trace", "generate-data"),
    "-t": ("chat", "trace", "bench", "eval", "fit", "verify", "generate-data"),
    "-ngl": ("chat", "bench", "eval", "generate-data"),
    "-ctk": ("chat", "trace", "bench", "eval", "fit", "verify"),
    "-ctv": ("chat", "trace", "bench", "eval", "fit", "verify"),
    "-n": ("chat", "trace", "generate-data"),
    "-s": ("chat", "generate-data", "synth", "train"),
    "-np": ("generate-data",),
    "-p": ("chat", "trace"),
    "-f": ("chat", "trace"),
    "-sys": ("chat",),
    "-ub": ("bench", "fit"),
    "-fa": ("bench",),
}


def parsed(command: str, *args: str) -> dict:
    """The parameters of a command line."""
    context = click.Context(cli, info_name="mod-export")
    found = cli.get_command(context, command)
    return found.make_context(command, list(args), parent=context, resilient_parsing=True).params


@pytest.mark.parametrize("alias", ALIASES)
def test_names_of_llama_cpp(alias):
    for command in ALIASES[alias]:
        assert len({str(value) for value in option(command, alias)["opts"]}) > 1


def test_values_of_llama_cpp():
    values = parsed("chat", "-m", "a.gguf", "-c0", "-t", "-1", "-ngl", "-1", "-n", "-1", "-s", "-1")
    assert (values["file"], values["ctx"], values["threads"]) == ("a.gguf", 0, None)
    assert (values["gpu_layers"], values["max_tokens"], values["seed"]) == (-1, -1, -1)
    assert parsed("chat", "-ctk", "q8_0", "--hf-repo", "org/name", "-n8")["file"] == "org/name"
    for command in ("inspect", "fit", "verify", "trace", "bench", "eval", "generate-data"):
        values = parsed(command, "--model", "a.gguf")
        assert "a.gguf" in (values.get("file"), values.get("target"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["inspect", "a.gguf", "-m", "b.gguf"], "given twice"),
        (["inspect", "-m", "a.gguf", "-hf", "org/name"], "given twice"),
        (["inspect", "-hf", "a.gguf"], "'a.gguf' is no name on the Hugging Face hub"),
        (["inspect"], "Missing argument 'FILE'"),
        (["chat", "a.gguf", "-t", "0"], "0 threads do nothing; -1 is all"),
        (["chat", "a.gguf", "-ctk", "q6_k"], "'q6_k' is not one of 'f32', 'f16'"),
    ],
)
def test_bad_values_of_such_options(run_cli, args, words):
    assert words in one_error_line(run_cli(*args))


def option(command: str, spelling: str) -> dict:
    """What a user sees of an option."""
    context = click.Context(cli, info_name="mod-export")
    options = cli.get_command(context, command).params
    found = next(option.to_info_dict() for option in options if spelling in option.opts)
    return {key: found[key] for key in ("opts", "type", "default", "help", "multiple", "nargs")}


@pytest.mark.parametrize(
    ("spelling", "commands"),
    [
        *((f"--{name}", ("chat", "generate-data")) for name in ("temperature", "top-p", "top-k")),
        *((f"--{name}", ("chat", "generate-data")) for name in ("min-p", "repeat-penalty")),
        *((f"--{name}", ("chat", "trace")) for name in ("prompt", "prompt-file")),
        *((name, ("chat", "serve", "trace")) for name in ("--ctx", "--threshold-shift")),
        *((name, ("chat", "serve")) for name in ("--gpu-layers", "--rpc")),
        ("--gpu-layers", ("bench", "eval")),  # without --rpc
        ("--threads", ("chat", "serve", "bench", "eval")),
    ],
)
def test_an_option_of_several_commands_is_one_option(spelling, commands):
    first, *others = [option(command, spelling) for command in commands]
    assert all(other == first for other in others)


def test_seeds():
    """What draws talk draws other talk each time, what writes files writes the same each time."""
    seeds = {name: option(name, "--seed") for name in ("chat", "generate-data", "synth", "train")}
    assert [seed.pop("default") for seed in seeds.values()] == [-1, 0, 0, 0]
    assert seeds["chat"] == seeds["generate-data"]


def test_one_idea_has_one_spelling():
    """An option of several commands that takes the same value has the same name in all of them."""
    context = click.Context(cli, info_name="mod-export")
    spellings = {
        option
        for name in COMMANDS
        for parameter in cli.get_command(context, name).params
        for option in parameter.opts
    }
    former = {option for _, option in FORMER} - {"--layers"}  # synth: the number of layers
    assert not spellings & former


@pytest.mark.parametrize(
    ("args", "example"),
    [
        (["serve", "m.gguf", "-np", "4"], "mod-export serve FILE -- -np"),
        (["lm-eval", "m.gguf", "--tasks", "piqa"], "mod-export lm-eval TARGET -- --tasks"),
    ],
)
def test_an_option_of_another_program_goes_behind_the_dashes(run_cli, args, example):
    error = one_error_line(run_cli(*args))
    assert error.startswith("error: No such option '-") and error.strip().endswith(example)


def test_the_version_names_the_library(run_cli):
    lines = run_cli("--version").stdout.splitlines()
    assert lines[0] == f"mod-export {__version__}"
    assert re.fullmatch(r"llama.cpp [0-9a-f]{9} of llama-cpp-python \d+\.\d+\.\d+", lines[1])
    installed = build.installed_build()
    expected = f"installed, {installed}" if installed else "not installed; run `mod-export build`"
    assert lines[2:] == [f"patched library: {expected}"]


@pytest.mark.parametrize(
    ("module", "extra"),
    [("accelerate", "train"), ("peft", "train"), ("matplotlib", "plots"), ("lm_eval", "lm-eval")],
)
def test_a_missing_extra_is_named_with_its_pip_line(monkeypatch, capsys, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    arguments = {
        "accelerate": ["train", "none", "-o", "out", "-d", "none"],
        "peft": ["train", "none", "-o", "out", "-d", "none", "--train", "lora"],
        "matplotlib": ["trace", "none", "-o", "x.png", "--prompt", "x"],
        "lm_eval": ["lm-eval", "none"],
    }
    with pytest.raises(SystemExit) as caught:
        main(arguments[module])
    error = f"error: the Python module {module} is missing; pip install 'mod_export[{extra}]'\n"
    assert (caught.value.code, capsys.readouterr().err) == (2, error)


def test_a_missing_module_without_an_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mod_export.inspection", None)
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "none.gguf"])
    assert caught.value.code == 2
    assert "is missing; install mod-export with its dependencies" in capsys.readouterr().err


def test_plots_are_checked_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'mod_export\[plots\]'"):
        check_folder(tmp_path / "plots", force=False)


def test_messages_have_one_handler(capsys):
    logger = logging.getLogger("mod_export.test")
    logger.info("silent")
    show_messages()
    logger.info("on stderr")
    show_messages(stdout=True, clock=True)
    logger.info("on stdout")
    logger.warning("a table\nof lines")
    hide_messages()
    logger.warning("silent again")
    out, err = capsys.readouterr()
    assert err == "on stderr\n" and out == "[   0 s] on stdout\na table\nof lines\n"


def test_classes_are_imported_when_they_are_asked_for():
    code = "import sys, mod_export; assert not {'torch', 'llama_cpp', 'numpy'} & set(sys.modules)\n"
    code += "from mod_export import MoDConfig; from mod_export.config import MoDConfig as same\n"
    code += "assert MoDConfig is same and 'torch' not in sys.modules\n"
    code += "from mod_export import convert, export; print(convert.__name__, export.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "mod_export.convert mod_export.export\n", done.stderr
    assert set(mod_export.__all__) <= set(dir(mod_export))
    with pytest.raises(AttributeError, match="has no attribute 'train'"):
        getattr(mod_export, "train")  # noqa: B009
