"""What several tests share: the command line in a subprocess."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def run_cli():
    """run_cli(*args, cwd=None) -> CompletedProcess of `mod-export args`, output as text."""

    def run(*args, cwd=None, **env):
        command = [sys.executable, "-m", "mod_export", *map(str, args)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path} | env
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)

    return run
