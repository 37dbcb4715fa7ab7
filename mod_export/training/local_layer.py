"""What the kv routers of one layer learn from what its own attention loses.

The attention's output, behind the output projection, is what the attention adds to the residual
stream. Its loss is the squared distance to the output of the original model, over the squared norm
of the residual stream, mean over tokens. Decisions are relaxed as in all training. Residual streams
are those of the original model, so that nothing crosses layers.

    routers = LocalLayer(model, walk, units, novel, learnt=20).taught(config, share=0.2)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mod_export.calibration.drift import ChunkMoments
from mod_export.calibration.thresholds import quantile_logit
from mod_export.model.layer_walk import LayerWalk
from mod_export.model.mod_model import MoDModel
from mod_export.model.router import rms_norm, threshold_logit
from mod_export.model.routing import DecisionStrategy, RoutingState
from mod_export.training import steady_router
from mod_export.training.config import TrainConfig
from mod_export.training.controller import Controller
from mod_export.training.loop import rate_at
from mod_export.training.prepare import BIAS_RATE
from mod_export.training.relaxation import HardDecisions, Relaxation, RelaxedDecisions
from mod_export.units import Unit

logger = logging.getLogger(__name__)

EPOCHS = 2  # the times that each sequence is learnt from: its residual streams are there already


class _Reached(Exception):
    """Ends the forward of a layer when the output of its attention is known."""


class LocalLayer:
    """The kv units of the layer where a walk is.

    Make it and use it within `relaxed_attention`. novel: bool [T] of each sequence of the walk, the
    tokens whose activation counts. learnt: how many of the sequences are learnt from, the first
    ones; the others judge.
    """

    def __init__(
        self,
        model: MoDModel,
        walk: LayerWalk,
        units: Sequence[Unit],
        novel: Sequence[torch.Tensor],
        learnt: int,
    ):
        self.model, self.walk, self.units, self.novel = model, walk, units, novel
        self.layer, self.learnt = units[0].layer, learnt
        self.part = walk.parts[self.layer]
        with torch.no_grad():
            self.dense = [self._added(number).cpu() for number in range(len(novel))]

    def taught(self, config: TrainConfig, share: float) -> dict[tuple, tuple]:
        """Teach the routers, and return their weights and biases, on the CPU, by unit.

        They keep the activation `share` on the sequences learnt from. Routers that lose no less on
        the others afterwards, at this activation, are those from before.
        """
        self._meet(share)
        before, loss_before = self._plain(), self.loss()
        self.learn(config, share)
        after, loss = self._plain(), self.loss()
        kept = "" if loss < loss_before else ", so that its routers stay"
        logger.info(
            f"layer {self.layer}: activation {share:.3f}, its attention loses {loss:.3g} where it "
            f"lost {loss_before:.3g}{kept}"
        )
        return before if kept else after

    def _plain(self) -> dict[tuple, tuple]:
        found = {}
        for unit in self.units:
            router = self.model.router(unit)
            steady = isinstance(router, steady_router.SteadyRouter)
            pair = router.plain() if steady else (router.weight, router.bias)
            found[tuple(unit)] = tuple(x.detach().cpu().clone() for x in pair)
        return found

    @torch.no_grad()
    def loss(self) -> float:
        """Return the loss of the hard decisions, mean over the sequences that judge."""
        losses = [
            self._loss(number, HardDecisions())[0] for number in range(self.learnt, len(self.novel))
        ]
        return torch.stack(losses).mean().item()

    def learn(self, config: TrainConfig, share: float) -> None:
        """Take the steps; the activation is `share` on the sequences learnt from."""
        self._steady(config.drift_penalty)
        routers = [self.model.router(unit) for unit in self.units]
        rates = (config.router_lr, BIAS_RATE * config.router_lr)
        groups = [[router.weight for router in routers], [router.bias for router in routers]]
        for p in (p for group in groups for p in group):
            p.requires_grad_(True)
        # Losses of a single layer are small: nothing but a small number may be added to them.
        optimizer = torch.optim.AdamW(
            [{"params": group} for group in groups], betas=(0.9, 0.95), weight_decay=0.0, eps=1e-15
        )
        control = Controller([list(self.units)], [share], [share])
        generator = torch.Generator().manual_seed(config.seed + self.layer)
        orders = [torch.randperm(self.learnt, generator=generator) for _ in range(EPOCHS)]
        numbers = torch.cat(orders).tolist()
        for step, number in enumerate(numbers):
            torch.manual_seed(hash((config.seed, self.layer, step)) % 2**32)
            shift = self._gradients(number, control, step, share, config.temperature)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * rate_at(step, len(numbers), config.warmup)
            optimizer.step()
            optimizer.zero_grad()
            self._move(shift)
        for p in (p for group in groups for p in group):
            p.requires_grad_(False)
        self._meet(share)

    def _gradients(
        self, number: int, control: Controller, step: int, share: float, temperature: float
    ) -> float:
        """Take the gradients of a sequence; return what to add to the cut of the routers."""
        offset = torch.zeros((), device=self.walk.base.device, requires_grad=True)
        strategy = RelaxedDecisions(
            Relaxation(temperature), None, dict.fromkeys(self.units, offset)
        )
        loss, state = self._loss(number, strategy)
        z = self._distances(state)
        soft = torch.sigmoid(z)
        (loss + control.prices(step).item() * soft.mean()).backward()
        rise = offset.grad  # of the loss alone: the load term does not go through the offset
        slope = (soft * (1 - soft)).mean().detach()
        quantile = quantile_logit(self._counted(z.detach(), number), share)
        shift = control.update(
            step, torch.tensor([[quantile, quantile]]), rise.cpu()[None], slope.cpu()[None]
        )
        return shift.item()

    def _loss(self, number: int, strategy: DecisionStrategy) -> tuple[torch.Tensor, RoutingState]:
        position = torch.arange(len(self.novel[number]), device=self.walk.base.device)[None]
        state = self.model._state(position, strategy)
        h = self.walk.h(number)[0].float()
        with self.model._deciding(self.layer, state):
            added = self._added(number)
        lost = (added.float() - self.dense[number].to(h.device).float()).pow(2).sum(-1)
        return (lost / h.pow(2).sum(-1).clamp(min=1e-6)).mean(), state

    def _added(self, number: int) -> torch.Tensor:
        """Return what the attention adds to a sequence, [T, n_embd]."""
        with self._stopped() as found:
            self.walk.run(number)
        return found[0][0]

    @contextmanager
    def _stopped(self) -> Iterator[list[torch.Tensor]]:
        """Give a list that gets the output of the attention, with which the layer's run ends."""
        found: list[torch.Tensor] = []

        def reached(_module, _args, out):
            found.append(out[0] if isinstance(out, tuple) else out)
            raise _Reached

        handle = self.part.attn_out.register_forward_hook(reached)
        try:
            yield found
        except _Reached:
            pass
        finally:
            handle.remove()

    def _distances(self, state: RoutingState) -> torch.Tensor:
        """Return the distance of each logit to the threshold, [n_unit, T]."""
        cut = threshold_logit(self.model.router(self.units[0]).threshold)
        return torch.stack([state.logit[unit][0] for unit in self.units]) - cut

    def _counted(self, z: torch.Tensor, number: int) -> torch.Tensor:
        """Return the distances of the tokens whose activation counts; sinks are active."""
        z = z.clone()
        z[:, : self.model.config.sink_tokens] = float("inf")
        return z[:, self.novel[number].to(z.device)]

    def _move(self, more: float) -> None:
        """Move the cut of all routers: their biases, because all layers have one threshold."""
        with torch.no_grad():
            for unit in self.units:
                self.model.router(unit).bias -= more

    @torch.no_grad()
    def _meet(self, share: float) -> None:
        """Move the cut so that the share of what is learnt from is active."""
        routers, found = [self.model.router(unit) for unit in self.units], []
        cut = threshold_logit(routers[0].threshold)
        for number in range(self.learnt):
            x = rms_norm(self.walk.h(number)[0], routers[0].eps)
            z = torch.stack([router(x, x) for router in routers]) - cut
            found.append(self._counted(z, number).cpu())
        self._move(quantile_logit(torch.cat(found, 1), share))

    @torch.no_grad()
    def _steady(self, penalty: float) -> None:
        """Put routers in place whose steps move little of what drifts.

        What the routers say of it as they come stays: calibration has weighed that already, and to
        take more out costs more than the few steps win back (docs/log.md).
        """
        moments, eps = ChunkMoments(), self.model.router(self.units[0]).eps
        for number in range(self.learnt):
            moments.add(rms_norm(self.walk.h(number)[0], eps))
        rows = steady_router.drift_correction(moments.within(), moments.drift().cpu(), penalty)
        drift, correction = (x.to(self.walk.base.device) for x in rows)
        for unit in self.units:
            router = self.model.router(unit)
            steady = steady_router.SteadyRouter(
                router.weight, router.bias, router.threshold, router.eps
            )
            own = steady.weight.detach(), steady.bias.detach()
            steady.reparametrise(own, moments.mean(), drift, correction)
            self.model.replace_router(unit, steady)
