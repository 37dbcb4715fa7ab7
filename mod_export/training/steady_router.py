"""Routers that do not follow what drifts: the same share of tokens in any text, at any length.

calibration/drift.py says what drifts, and measures it. Here the directions that drift are taken out
of router weights in closed form (`drift_correction`), and the routers are reparametrised, so that a
step of training moves what tells tokens apart within a chunk, and little of what tells chunks
apart.

    install(model)                                               # SteadyRouter instead of Router
    penalise_drift(model, sequences, penalty=10.0)               # before training
    penalise_drift(model, sequences, penalty=10.0, trained=True) # halfway
    remove(model)                                                # plain routers, the same logits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mod_export.calibration.drift import ChunkMoments, router_inputs
from mod_export.model.mod_model import MoDModel
from mod_export.model.router import Router, rms_norm
from mod_export.units import KV, Unit

# Routers of these kinds lose their drift before training, and stay steady: they were calibrated on
# few kinds of text, and training text has more. Other kinds lose their drift halfway, when training
# has changed what drifts.
KINDS_STEADY_FROM_START = (KV,)
# Penalty on the weights, against inputs of their own variance, as for kv in calibrate.py.
WEIGHT_PENALTY = 0.01

Parameters = tuple[torch.Tensor, torch.Tensor]  # A router has weight [n_embd] and bias [1].


class SteadyRouter(Router):
    """A router whose parameters act through buffers.

    The weight w of the rule is start + v - correction^T drift v, with v the parameter `weight`. The
    bias of the rule is bias + offset. The mean of the inputs, `center` [n_embd], is taken from the
    normed input first. Without `reparametrise` it is a plain router.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, threshold: float, eps: float):
        super().__init__(weight, bias, threshold, eps)
        for name in ("start", "center"):
            self.register_buffer(name, torch.zeros_like(self.weight), persistent=False)
        self.register_buffer("offset", torch.zeros_like(self.bias), persistent=False)
        for name in ("drift", "correction"):
            self.register_buffer(name, self.weight.new_zeros(0, len(self.weight)), persistent=False)

    def forward(self, h: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        with torch.autocast(h.device.type, enabled=False):
            weight = self.start + self._corrected(self.weight)
            x = rms_norm(h, self.eps) if x is None else x
            return (x - self.center) @ weight + (self.bias + self.offset)

    @torch.no_grad()
    def reparametrise(
        self,
        parameters: Parameters,
        center: torch.Tensor,
        drift: torch.Tensor,
        correction: torch.Tensor,
        remove_drift: bool = False,
    ) -> None:
        """Choose buffers that give the same logits, and steps of the parameters another effect.

        parameters: the router's own, which may be in pieces (devices.py) outside of a forward; they
        stay as they are. center: [n_embd]. drift, correction: [k, n_embd], of drift_correction.
        remove_drift: take the drift out of the weight; the logits of inputs whose mean is `center`
        keep their mean.
        """
        weight, bias = self.plain(parameters)
        at_center = bias + center @ weight
        if remove_drift:
            weight = weight - (drift @ weight) @ correction
        self.center, self.drift, self.correction = center.clone(), drift.clone(), correction.clone()
        self.start = weight - self._corrected(parameters[0])
        self.offset = at_center - parameters[1]

    @torch.no_grad()
    def plain(self, parameters: Parameters | None = None) -> Parameters:
        """Return weight [n_embd] and bias [1] of the plain router with the same logits."""
        v, bias = parameters or (self.weight.detach(), self.bias.detach())
        weight = self.start + self._corrected(v)
        return weight, bias + self.offset - self.center @ weight

    def buffer_state(self) -> dict[str, torch.Tensor]:
        """Return the buffers, on the CPU, for a checkpoint."""
        return {name: x.cpu() for name, x in self.named_buffers()}

    def load_buffer_state(self, state: dict[str, torch.Tensor]) -> None:
        """Set the buffers of a checkpoint."""
        device = self.start.device
        for name, x in state.items():
            self.register_buffer(name, x.to(device), persistent=False)

    def _corrected(self, v: torch.Tensor) -> torch.Tensor:
        return v - (self.drift @ v) @ self.correction if len(self.drift) else v


def install(model: MoDModel) -> None:
    """Put a SteadyRouter with the same logits in the place of each router."""
    for unit in model.config.routed():
        router = model.router(unit)
        steady = SteadyRouter(router.weight, router.bias, router.threshold, router.eps)
        model.replace_router(unit, steady)


def remove(model: MoDModel) -> None:
    """Put a plain router with the same logits in the place of each SteadyRouter."""
    for unit in model.config.routed():
        router = model.router(unit)
        if isinstance(router, SteadyRouter):
            plain = Router(*router.plain(), router.threshold, router.eps)
            model.replace_router(unit, plain)


@torch.no_grad()
def penalise_drift(
    model: MoDModel,
    sequences: torch.Tensor,
    penalty: float,
    forward: Callable | None = None,
    trained: bool = False,
) -> None:
    """Reparametrise the routers on what they read in the original model.

    trained: on what they read in the model as it decides and skips; then the kinds of
    KINDS_STEADY_FROM_START stay as they are. These kinds lose their drift in the original model,
    the others in the trained one. A loss changes logits, so thresholds have to be chosen anew. With
    a penalty of 0 nothing is lost: the mean is taken from the inputs, no more.

    sequences: [n, T] tokens, of all the kinds of text that there are, as long as can be. penalty:
    weight of a variance from chunk to chunk over one within a chunk. forward: of the model, where
    its parameters are in pieces.
    """
    with model.forced(None if trained else "active"), _noting_parameters(model) as parameters:
        moments = router_inputs(model, sequences, ChunkMoments, forward)
    by_layer = model.config.by_layer()
    for place, seen in moments.items():
        from_start = place.kind in KINDS_STEADY_FROM_START
        if trained and from_start:
            continue
        drift, correction = (
            rows.to(model.base.device)
            for rows in drift_correction(seen.within(), seen.drift().cpu(), penalty)
        )
        for unit in by_layer[place]:
            model.router(unit).reparametrise(
                parameters[unit], seen.mean(), drift, correction, trained or from_start
            )


@contextmanager
def _noting_parameters(model: MoDModel) -> Iterator[dict[Unit, Parameters]]:
    """Note the parameters of each router while a forward runs: elsewhere they may be in pieces."""
    found: dict[Unit, Parameters] = {}
    hooks = []
    for unit in model.config.routed():

        def note(router, _args, unit=unit):
            found[unit] = (router.weight.detach().clone(), router.bias.detach().clone())

        hooks.append(model.router(unit).register_forward_pre_hook(note))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def drift_correction(
    within: torch.Tensor, drift: torch.Tensor, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return drift B and correction P, [k, n_embd], such that w = v - P^T B v minimises

        (w - v)^T A (w - v) + penalty w^T B^T B w,    A: `within` and a small penalty.

    The solution is (A + penalty B^T B)^-1 A v. By Woodbury's identity k rows are all that has to be
    kept.
    """
    if penalty == 0:
        return drift[:0], drift[:0]
    a = within.double() + torch.diag(WEIGHT_PENALTY * within.diagonal().clamp(min=1e-12)).double()
    solved = torch.linalg.solve(a, drift.double().T)  # A^-1 B^T, [n_embd, k]
    small = (
        torch.eye(len(drift), dtype=torch.float64, device=a.device) / penalty
        + drift.double() @ solved
    )
    correction = torch.linalg.solve(small, solved.T)  # (I / penalty + B A^-1 B^T)^-1 B A^-1
    return drift, correction.to(drift.dtype)
