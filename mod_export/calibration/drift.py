"""Keep routers from following what drifts: their share of active tokens shall be that of any text,
at any length.

A router sees more than the token: the kind of text, and how much came before, move the hidden
states of hundreds of tokens together, and with them the share that reaches p. What moves is
measured as the covariance of the inputs' means over chunks of text, and above all of what all texts
have in common at a place; a weight that says the same within a chunk, and little about it, is found
in closed form (`damp`; calibration has the same term in its ridge).

    hold_steady(model, sequences, steady=10.0, forward=forward)                  # before training
    hold_steady(model, sequences, steady=10.0, forward=forward, trained=True)    # halfway
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mod_export.config import Unit
from mod_export.model.mod_model import MoDModel
from mod_export.model.router import rms_norm

CHUNK = 256  # tokens, over which a mean is taken to see what drifts
# How much more than a chunk's mean the mean of all texts at a place weighs. It is known less well
# and does more: it has one sign at the beginning of each text, and the other thousands of tokens
# later.
PLACE = 500.0
# Kinds whose routers lose the drift that they have before training, and stay steady: they were
# calibrated on few kinds of text, and training text has more. Others lose it halfway, when training
# has changed what drifts.
DAMPED = ("kv",)
PENALTY = 0.01  # on the weights, against inputs of their own variance, as for kv in calibrate.py


@torch.no_grad()
def hold_steady(
    model: MoDModel,
    sequences: torch.Tensor,
    steady: float,
    forward: Callable | None = None,
    trained: bool = False,
) -> None:
    """Reparametrise routers (Router.reparametrise) on what they read in the original model; with
    `trained`, in the model as it decides and skips, and those of kinds not in DAMPED alone.

    Routers of kinds in DAMPED lose what they say about whole chunks in the former, the others in
    the latter: logits change, and thresholds have to be chosen anew. With steady = 0 none do: the
    mean is taken from the inputs, no more.

    sequences: [n, T] tokens, of all the kinds of text that there are, as long as can be; steady:
    how much more a variance from chunk to chunk weighs than one within; forward: of the model,
    where its parameters are in pieces.
    """
    with model.forced(None if trained else "active"):
        moments = observe(model, sequences, Moments, forward)
    for unit, seen in moments.items():
        damped = unit[1] in DAMPED
        if not (trained and damped):
            of_drift = damp(seen.within(), seen.drift(), steady)
            model.router(unit).reparametrise(
                seen.whole, seen.mean(), *of_drift, lose=trained or damped
            )


@torch.no_grad()
def observe(
    model: MoDModel, sequences: torch.Tensor, kind: type[Means], forward: Callable | None = None
) -> dict[Unit, Means]:
    """What each router reads on sequences [n, T]. forward: of the model, None is its own."""
    units = model.config.routed()
    seen = {unit: kind(model.router(unit).start) for unit in units}
    hooks = []
    for unit in units:

        def add(router, args, _out, means=seen[unit]):
            with torch.autocast(args[0].device.type, enabled=False):
                means.add(rms_norm(args[0][0], router.eps))
                means.whole = router.whole()  # here they are

        hooks.append(model.router(unit).register_forward_hook(add))
    try:
        for ids in sequences:
            (forward or model)(ids[None].to(model.base.device), logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


class Means:
    """Of a router's inputs over chunks, and the chunks' places. like: [n_embd]; whole: the router's
    parameters.
    """

    def __init__(self, like: torch.Tensor):
        self.means, self.places, self.whole = [], [], None

    def add(self, x: torch.Tensor) -> None:
        """x: [T, n_embd], the inputs of one sequence from its beginning."""
        for number, chunk in enumerate(x.split(CHUNK)):
            self.means.append(chunk.mean(0))
            self.places.append(number.bit_length())  # 1, 1, 2, 4, ... chunks: what moves slows down

    def mean(self) -> torch.Tensor:
        """[n_embd], each chunk counted alike."""
        return torch.stack(self.means).mean(0)

    def drift(self) -> torch.Tensor:
        """[k, n_embd] whose Gram matrix is the covariance of the chunks' means, and PLACE times
        that of the places'.
        """
        means, places = torch.stack(self.means), torch.tensor(self.places)
        of_places = torch.stack(
            [means[places == place].mean(0) for place in sorted(set(self.places))]
        )
        parts = ((means, 1.0), (of_places, PLACE))
        return torch.cat([(x - x.mean(0)) * (weight / len(x)) ** 0.5 for x, weight in parts])


class Moments(Means):
    """And the inputs' covariance within chunks."""

    def __init__(self, like: torch.Tensor):
        super().__init__(like)
        self.n, self.inside = 0, torch.zeros(len(like), len(like), device=like.device)

    def add(self, x: torch.Tensor) -> None:
        super().add(x)
        for chunk in x.split(CHUNK):
            chunk = chunk - chunk.mean(0)
            self.inside += chunk.T @ chunk
            self.n += len(chunk)

    def within(self) -> torch.Tensor:
        """[n_embd, n_embd]."""
        return self.inside / self.n


def damp(
    within: torch.Tensor, drift: torch.Tensor, steady: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (drift B [k, n_embd], back P [k, n_embd]), such that w = v - P^T B v minimises

        (w - v)^T A (w - v) + steady w^T B^T B w,    A: `within` and a small penalty.

    It is (A + steady B^T B)^-1 A v; by Woodbury's identity k rows are all that has to be kept.
    """
    if steady == 0:
        return drift[:0], drift[:0]
    a = within.double() + torch.diag(PENALTY * within.diagonal().clamp(min=1e-12)).double()
    solved = torch.linalg.solve(a, drift.double().T)  # A^-1 B^T, [n_embd, k]
    small = (
        torch.eye(len(drift), dtype=torch.float64, device=a.device) / steady
        + drift.double() @ solved
    )
    back = torch.linalg.solve(small, solved.T)  # (I / steady + B A^-1 B^T)^-1 B A^-1
    return drift, back.to(drift.dtype)
