"""The folder of a calibration that can be stopped and goes on: whose it is, and who works in it.

    with run_folder(Path("mod.run"), identity) as folder:
        calibrate(base, tokenizer, plan, folder)

The folder holds one file for each pass through the model (model/walk_state.py), and run.json.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from mod_export.common.files import atomic_file, locked
from mod_export.errors import UserError
from mod_export.formats import hf_directory

logger = logging.getLogger(__name__)

RUN_JSON = "run.json"


@contextlib.contextmanager
def run_folder(path: Path, identity: dict) -> Iterator[Path]:
    """Hold the folder of a calibration, which stays when the block ends, also where it is stopped.

    identity: what the results depend on, of types that JSON has. Raises UserError where the folder
    belongs to a calibration with another identity, and where another process works in it. A folder
    in which nothing was kept is removed.
    """
    if path.is_dir() and not (path / RUN_JSON).is_file() and any(path.glob("[!.]*")):
        raise UserError(
            f"{path} is no folder of a conversion", "choose another output, or move it away"
        )
    path.mkdir(exist_ok=True)

    def busy():
        raise UserError(
            f"another process converts into {path}", "wait for it, or choose another output"
        )

    with locked(path, busy):
        for stale in path.glob(".*.tmp"):
            stale.unlink()
        try:
            _check(path, json.loads(json.dumps(identity)))
            yield path
        except KeyboardInterrupt:
            if _has_state(path):
                logger.info(f"{path} has what was reached: the same command goes on from there")
            raise
        finally:
            if not _has_state(path):
                shutil.rmtree(path, ignore_errors=True)


def _has_state(path: Path) -> bool:
    return any(path.glob("*.pt"))


def _check(path: Path, identity: dict) -> None:
    """Write the identity, or compare it with the one that is there."""
    file = path / RUN_JSON
    if not _has_state(path):
        with atomic_file(file, force=True) as tmp:
            tmp.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        return
    before = hf_directory.read_json(file, f"remove {path}")
    for name in (*identity, *before):
        if before.get(name) != identity.get(name):
            raise UserError(
                f"{path} is of a conversion with another {name}",
                f"give the same arguments, or remove {path}",
            )
    logger.info(f"going on from {path}")
