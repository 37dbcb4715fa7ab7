"""Files for llama-server: the embedded SmolLM2, and the same with the packaged adapter.

`scripts/test server` also builds the stock llama-server, which the patched one is compared with.
"""

from dataclasses import replace
from pathlib import Path

import pytest

WINDOW = 32  # A token is dropped soon, so that short conversations meet what long ones meet.


@pytest.fixture(scope="session")
def dense() -> Path:
    from mod_export.formats import hub

    return hub.embedded_gguf()


@pytest.fixture(scope="session")
def shipped(dense, tmp_path_factory) -> Path:
    """SmolLM2 with the packaged adapter as it is."""
    return _with_adapter(dense, tmp_path_factory.mktemp("server") / "shipped.gguf")


@pytest.fixture(scope="session")
def mod(dense, tmp_path_factory) -> Path:
    """The same with a short window: half of the keys and values are soon forgotten."""
    return _with_adapter(dense, tmp_path_factory.mktemp("server") / "mod.gguf", WINDOW)


@pytest.fixture(scope="session")
def stock_tools() -> Path:
    """The folder of the stock llama-server."""
    from mod_export.llamacpp import build

    return build.tools_dir(stock=True) or pytest.skip(
        "needs the stock llama-server: run `mod-export build --stock --tools`"
    )


def _with_adapter(dense: Path, path: Path, window: int | None = None) -> Path:
    from mod_export.export import write_routers
    from mod_export.formats import adapter_files
    from mod_export.formats.gguf import GGUFFile

    adapter = adapter_files.read(adapter_files.resolve("smollm2-kv"))
    config = adapter.config
    if window:
        units = {"kv": replace(config.units["kv"], window=())}
        config = replace(config, kv_window=window, units=units)
    write_routers(GGUFFile.open(dense), path, config, adapter.routers)
    return path
