"""Write and read the checkpoint of a training run.

A checkpoint is one file, which appears whole or not at all, and holds only what is trained. Noise
is seeded by step (`seed_step`) and data by position, so the number of a step is all the state of
both. A resumed run gives the losses of a run that was never interrupted.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mod_export.common.files import atomic_file
from mod_export.errors import UserError

NAME = "checkpoint.pt"
AFRESH = "start without --resume, and with --force"
PARTS = {"weights", "optimizer", "step", "control", "run", "thresholds", "buffers"}


def save(run: Path, student, optimizer, state: dict, main: bool = True) -> None:
    """Gather the trained weights and the optimizer's state, and write them on the main process.

    All processes call this function. state: step, controller and options of the run, of types that
    torch.save takes. Raises UserError where the file cannot be written; the former checkpoint then
    stays as it was.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, moments = get_state_dict(student, _plain(optimizer), options=options)
    if not main:
        return
    path = run / NAME
    try:
        with atomic_file(path, force=True) as tmp:
            torch.save({"weights": weights, "optimizer": moments, **state}, tmp)
    except RuntimeError as error:  # torch's writer raises it for a full disk
        cure = "free some space and " + ("go on with --resume" if path.exists() else "start again")
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}", cure) from error


def clean(run: Path) -> None:
    """Remove what an unfinished checkpoint has left, because a second Ctrl-C stops at once."""
    for path in run.glob(f".{NAME}.*.tmp"):
        path.unlink(missing_ok=True)


def load(run: Path) -> dict:
    """Return the checkpoint of a run directory.

    Raises UserError where the directory has no checkpoint, or a damaged one.
    """
    path = run / NAME
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}", "start without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]})", AFRESH) from error
    if not isinstance(state, dict) or not state.keys() >= PARTS:
        raise UserError(f"{path} is no checkpoint of a training run", AFRESH)
    return state


def restore(student, optimizer, state: dict) -> None:
    """Put the weights and the optimizer's state back.

    Raises UserError where they are those of another model.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    try:
        set_state_dict(
            student,
            _plain(optimizer),
            model_state_dict=state["weights"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
        # Before the first step the optimizer has no state, and torch has made one up.
        if not state["optimizer"]["state"]:
            _plain(optimizer).state.clear()
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the checkpoint does not fit the model ({reason})", AFRESH) from error


def check(state: dict, expected: dict) -> None:
    """Raise UserError where the run that left the checkpoint differs from this one.

    The error names the first difference.
    """
    before, now = _flat(state["run"]), _flat(expected)
    for name in (*now, *before):
        if before.get(name) != now.get(name):
            was, value = before.get(name), now.get(name)
            raise UserError(
                f"the checkpoint was made with another {name}: {_short(was)}, now {_short(value)}",
                f"resume with the same arguments, or {AFRESH}",
            )


def seed_step(seed: int, step: int, micro: int, process: int) -> None:
    """Seed the noise of one forward, which is the same whenever the step is run."""
    torch.manual_seed(hash((seed, step, micro, process)) & 0x7FFF_FFFF_FFFF_FFFF)


def _plain(optimizer):
    """Return torch's optimizer, which Accelerate may have wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def _flat(run: dict) -> dict:
    """Return the groups of a run's figures as one dictionary.

    {"options": {"length": 512}} becomes {"length": 512}. The names of other groups stay, as in
    "base hidden_size".
    """
    found = {}
    for name, value in run.items():
        parts = value.items() if isinstance(value, dict) else [(None, value)]
        found |= {
            " ".join(filter(None, (name if name != "options" else None, part))): x
            for part, x in parts
        }
    return found


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
