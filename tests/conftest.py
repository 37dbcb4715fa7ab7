"""What several tests share: the command line in a subprocess, and a model to talk to."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def run_cli():
    """run_cli(*args, cwd=None) -> CompletedProcess of `mod-export args`, output as text."""

    def run(*args, cwd=None, **env):
        command = [sys.executable, "-m", "mod_export", *map(str, args)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path} | env
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
        )

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A GGUF of SmolLM2, with random kv and ffn routers where the library can run them."""
    from mod_export.config import MoDConfig, UnitConfig
    from mod_export.export import write_routers
    from mod_export.model import loading
    from mod_export.runtime import bindings

    if not bindings.patched():
        return loading.embedded_gguf()
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
    write_routers(loading.embedded_gguf(), path, MoDConfig(kv_window=16, units=units), routers)
    return path
