"""What happens to the routers beside the steps of a training run: drift and thresholds.

Before the first step, routers lose what drifts, and thresholds are chosen for the activation of the
first step. Halfway, routers lose the drift that training has brought back. At the end, thresholds
are chosen for the target.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

from mod_export.calibration.measuring import sequences_joined
from mod_export.calibration.thresholds import set_thresholds
from mod_export.data.packing import PackedData
from mod_export.model.mod_model import MoDModel
from mod_export.training import steady_router
from mod_export.training.loop import Loop

logger = logging.getLogger(__name__)

# Tokens that thresholds are chosen on, in long sequences: memory counts there.
THRESHOLD_TOKENS = 16384
DRIFT_TOKENS = 24576  # tokens that drift is measured on
MIN_SEQUENCES = 6  # Both measures take at least this many training sequences.


class RouterCallback:
    """Measures drift, and chooses thresholds, on the training data of a loop."""

    def on_start(self, loop: Loop) -> None:
        """Take the drift out of the routers, and meet the activation of the first step."""
        if loop.config.method != "static":
            logger.info("measuring what drifts")
            self._penalise_drift(loop)
        if loop.config.method == "threshold":
            self._set_thresholds(loop, loop.control.target(0).tolist())

    def on_half(self, loop: Loop, step: int) -> None:
        """Take the drift out again, as it is in what training has made of the model.

        The steps to come mend what that costs. Their learning rates are low, so little drift comes
        back.
        """
        kinds = set(loop.model.config.units)
        lose_it_now = not kinds <= set(steady_router.KINDS_STEADY_FROM_START)
        if loop.config.method == "threshold" and loop.config.drift_penalty and lose_it_now:
            logger.info("measuring what drifts in the model as it is now")
            self._penalise_drift(loop, trained=True)
            self._set_thresholds(loop, loop.control.target(step).tolist())

    def on_end(self, loop: Loop) -> None:
        """Meet the target."""
        if loop.config.method == "threshold":
            self._set_thresholds(loop, loop.control.targets)

    def _penalise_drift(self, loop: Loop, trained: bool = False) -> None:
        sequences, _ = long_sequences(loop.model, loop.train, DRIFT_TOKENS)
        with loop.accelerator.autocast():
            steady_router.penalise_drift(
                loop.model, sequences, loop.config.drift_penalty, _forward(loop), trained
            )

    @torch.no_grad()
    def _set_thresholds(self, loop: Loop, targets: list[float]) -> None:
        """Choose thresholds on training sequences; the held-out ones judge them."""
        sequences, novel = long_sequences(loop.model, loop.train, THRESHOLD_TOKENS)
        groups = dict(zip(loop.control.names, loop.control.groups, strict=True))
        shares = dict(zip(loop.control.names, targets, strict=True))
        with loop.accelerator.autocast():
            loop.activation_at_thresholds = set_thresholds(
                loop.model, sequences, groups, shares, forward=_forward(loop), novel=novel
            )


def _forward(loop: Loop) -> Callable:
    """Return the forward of the hard model through the prepared module.

    Anywhere else its parameters may be in pieces.
    """
    return functools.partial(loop.student, teach=False)


def long_sequences(
    model: MoDModel, data: PackedData, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join consecutive sequences of the data to long ones, spread evenly over it.

    tokens: of all of them. Returns the ids, and whether their activation counts, both [n, T].
    """
    many = sequences_joined(model.base, data.length, len(data))
    available = len(data) // many
    count = min(available, max(-(-MIN_SEQUENCES // many), tokens // (many * data.length)))
    starts = [i * available // count * many for i in range(count)]
    joined = [[data[k] for k in range(at, at + many)] for at in starts]
    ids, novel = (
        torch.stack([torch.cat([item[name] for item in items]) for items in joined])
        for name in ("input_ids", "novel")
    )
    return ids, novel
