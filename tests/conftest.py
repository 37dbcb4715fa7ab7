"""Four tiers of tests, one folder each, and what several tests share.

    unit     seconds, without llama.cpp; `pytest` alone runs these
    runtime  minutes, on the patched library; `pytest tests/runtime` or `pytest -m runtime`
    slow     builds, several processes, random operations; `pytest tests/slow` or `pytest -m slow`
    server   minutes, on llama-server; `pytest tests/server`, after `mod-export build --tools`

`pytest tests` runs all of them. scripts/test leaves `server` to `scripts/test server`. A folder is
run by as many processes as there are CPUs, a file by one.
"""

import os
import signal
import sys

# Models of tests are small: more threads cost time, above all next to another process of tests.
# Threads that wait must not spin. Set before any library reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Where there is a debugger, a process that aborts would let it print into the process's output.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

# A shell starts background jobs with Ctrl-C ignored, which processes of tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pathlib import Path

import pytest

from mod_export.cli.output import hide_messages
from tests.support import command_line
from tests.support.warm_python import WarmPython

TESTS = Path(__file__).resolve().parent
TIERS = ("slow", "server", "runtime", "unit")  # the order in which all of them run
# Files that take longest begin, so that all processes end at about the same time.
LONG_FILES = (
    "test_architectures.py",
    "test_checkpoints.py",
    "test_model_types.py",
    "test_run.py",
    "test_studies.py",
    "test_synthetic.py",
)


def tier_of(path: Path) -> str:
    return path.relative_to(TESTS).parts[0]


def pytest_configure(config):
    """-m without a path looks at all tests. The unit tier alone cannot import llama_cpp."""
    if config.option.markexpr and config.args_source == config.ArgsSource.TESTPATHS:
        config.args[:] = [str(TESTS)]
    paths = [Path(config.invocation_params.dir, arg.partition("::")[0]) for arg in config.args]
    if all(path.resolve().is_relative_to(TESTS / "unit") for path in paths):
        sys.modules["llama_cpp"] = None  # the unit tests do without: modules neither


def pytest_xdist_auto_num_workers(config) -> int:
    """Of `-n auto`: one process where single files or tests are named."""
    named = config.args_source == config.ArgsSource.ARGS
    if named and not all(Path(arg).is_dir() for arg in config.args):
        return 0
    return len(os.sched_getaffinity(0))


def pytest_collection_modifyitems(items):
    """Marks of the tiers, and their order. What needs the patched library is skipped without it."""
    tiers = {item: tier_of(item.path) for item in items}
    for item, tier in tiers.items():
        item.add_marker(tier)
    items.sort(key=lambda item: (TIERS.index(tiers[item]), item.path.name not in LONG_FILES))
    _skip(items, tiers, "runtime", _patched, "the patched llama.cpp: run `mod-export build`")
    _skip(items, tiers, "server", _tools, "llama-server: run `mod-export build --tools`")


def _skip(items, tiers, tier: str, is_there, need: str) -> None:
    here = [item for item in items if tiers[item] == tier]
    if here and not is_there():
        for item in here:
            item.add_marker(pytest.mark.skip(reason=f"needs {need}"))


def _tools() -> bool:
    from mod_export.llamacpp import build

    given = os.environ.get("LLAMA_CPP_LIB_PATH")
    return build.tools_dir() is not None or bool(given and Path(given, "llama-server").is_file())


def _patched() -> bool:
    from mod_export.runtime import bindings

    return bindings.patched()


@pytest.fixture(autouse=True)
def _messages_hidden():
    """A command or study that a test runs in this process prints no messages of later tests."""
    yield
    hide_messages()


@pytest.fixture(scope="session", autouse=True)
def _warm_converter():
    """Conversions of this process start from one that has imported torch and transformers.

    tests/slow/test_wheel.py runs the converter as users do.
    """
    from mod_export.llamacpp import converter

    python, cold = WarmPython(), converter._python

    def run(code, arguments, cwd=None):
        start = python.run if code == converter.CONVERTER_SCRIPT else cold
        return start(code, arguments, cwd)

    converter._python = run
    yield
    converter._python = cold
    python.close()


@pytest.fixture(scope="session")
def run_cli():
    """run_cli(*args, cwd=None, **environment) -> CompletedProcess of `mod-export args`, as text.

    In this process, as imports take seconds; in one of its own where its environment is another.
    """

    def run(*args, cwd=None, **environment):
        if environment:
            return command_line.spawn(*args, cwd=cwd, **environment)
        return command_line.run(*args, cwd=cwd)

    return run


@pytest.fixture(scope="session")
def spawn_cli():
    """spawn_cli(*args, cwd=None, **environment): run_cli, in a process of its own."""
    return command_line.spawn


@pytest.fixture(scope="session")
def smollm2():
    """The embedded SmolLM2 in torch, and its tokenizer. Copy it before it is changed."""
    from mod_export.model import loading

    return loading.load("smollm2")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A GGUF of SmolLM2, with random kv and ffn routers where the library can run them."""
    import numpy as np

    from mod_export.config import MoDConfig, UnitConfig
    from mod_export.export import write_routers
    from mod_export.formats import hub
    from mod_export.formats.gguf import GGUFFile

    if not _patched():
        return hub.embedded_gguf()
    rng = np.random.default_rng(0)
    units, routers = {}, {}
    for kind, layers in {"kv": range(3, 28), "ffn": (10, 20)}.items():
        half = [0.5 * (layer in layers) for layer in range(30)]
        units[kind] = UnitConfig(tuple(half), tuple(1 - x for x in half))
        for layer in layers:
            routers[layer, kind] = (
                rng.standard_normal(576, np.float32) / 24,
                np.array([0.5], np.float32),
            )
    path = tmp_path_factory.mktemp("model") / "mod.gguf"
    dense = GGUFFile.open(hub.embedded_gguf())
    write_routers(dense, path, MoDConfig(kv_window=16, units=units), routers)
    return path
