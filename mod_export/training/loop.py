"""The steps of a training run, on one device or many through Accelerate.

Knows nothing of files of models: prepare.py makes what a loop works on, and run.py writes what
comes out.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mod_export.calibration.thresholds import MAX_LOGIT
from mod_export.common.progress import Progress, stage
from mod_export.data.packing import PackedData, order
from mod_export.data.repeats import counted
from mod_export.errors import UserError
from mod_export.metrics import divergence, visible_share
from mod_export.model.architectures import layer_windows
from mod_export.model.router import logit_threshold, threshold_logit
from mod_export.model.routing import TopK
from mod_export.training import checkpoints
from mod_export.training.config import TrainConfig
from mod_export.training.controller import Controller
from mod_export.training.devices import number
from mod_export.training.log import Log
from mod_export.training.passages import ask_for_passages
from mod_export.training.student import Student
from mod_export.units import Unit

logger = logging.getLogger(__name__)

MIN_RATE_SHARE = 0.1  # This share of the learning rate is left at the end of its decay.


class Callback(Protocol):
    """What is done beside the steps of a run."""

    def on_start(self, loop: Loop) -> None:
        """Prepare the model for the first step; not called for a run that is resumed."""

    def on_half(self, loop: Loop, step: int) -> None:
        """Act when half of the steps are done; step: their number."""

    def on_end(self, loop: Loop) -> None:
        """Act after the last step, before the last evaluation."""


@dataclass
class Setup:
    """What a loop works on; prepare.py makes it.

    student, optimizer: prepared by `accelerator`, Accelerate's object. train, held_out: sequences.
    run: directory of checkpoint and metrics. identity: what a checkpoint must agree with.
    """

    config: TrainConfig
    accelerator: Any
    student: Student
    optimizer: torch.optim.Optimizer
    control: Controller
    train: PackedData
    held_out: PackedData
    run: Path
    identity: dict


class Loop:
    """Runs the steps of a training run.

    activation_at_thresholds: of each unit, when thresholds were last chosen. activation_held_out:
    of each unit, when the held-out text was last read.
    """

    def __init__(self, setup: Setup):
        self.config = setup.config
        self.accelerator = setup.accelerator
        self.student = setup.student
        self.optimizer = setup.optimizer
        self.control = setup.control
        self.train = setup.train
        self.held_out = setup.held_out
        self.run = setup.run
        self.identity = setup.identity
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.model = self.accelerator.unwrap_model(self.student).model
        self.units = self.model.config.routed()
        self.main = self.accelerator.is_main_process
        processes = self.accelerator.num_processes
        self.steps = self.config.steps(processes)
        of_process = self.config.length * self.config.batch * self.config.accumulate
        self.tokens_per_step = of_process * processes
        self.activation_at_thresholds: dict[Unit, float] = {}
        self.activation_held_out: dict[Unit, float] = {}

    def go(self, callback: Callback, first: int = 0) -> dict:
        """Run the steps after `first`, and return the figures of the hard model on held-out text.

        Raises UserError where the loss is no number, and SystemExit after SIGTERM or SIGINT.
        """
        log = Log(self.run, self.steps, first, self.control.names) if self.main else None
        try:
            with stopping() as stop:
                self._steps(first, callback, log, stop)
        finally:
            if log:
                log.close()
        callback.on_end(self)
        self.choose(self.steps)
        return self.evaluate()

    def _steps(self, first: int, callback: Callback, log: Log | None, stop: list[int]) -> None:
        figures = {}
        for step in range(first, self.steps):
            if step == self.steps // 2 != first:  # a checkpoint of this step is written after it
                with log.aside() if log else contextlib.nullcontext():
                    callback.on_half(self, step)
            with stage("the first step") if step == first else contextlib.nullcontext():
                seen = self._gradients(step, stop)
            # A step may have spoilt the weights, so a checkpoint waits until a loss has seen them.
            if self._stopped(stop):
                self.save(step)
                self._stop(step, stop)
            if step % self.config.save_every == 0 and step > first:
                self.save(step)
            row = self._update(step, seen)
            if log:
                log.step({"step": step + 1, **row}, self.tokens_per_step)
            if (step + 1) % self.config.eval_every == 0 or step + 1 == self.steps:
                figures = self.evaluate()
                if log:
                    log.held_out({"step": step + 1, "held_out": figures})
        if figures:
            if not math.isfinite(figures["kl"]):
                raise self._not_finite(self.steps - 1)
            self.save(self.steps)
        if self._stopped(stop):
            self._stop(self.steps, stop)

    def _stopped(self, stop: list[int]) -> bool:
        """Return whether any process has been told to stop."""
        told = torch.tensor(float(bool(stop)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(told) > 0)

    def _stop(self, step: int, stop: list[int]) -> None:
        logger.info(f"stopped after step {step} of {self.steps}; go on with --resume")
        raise SystemExit(128 + (stop[0] if stop else signal.SIGTERM))

    def _gradients(self, step: int, stop: list[int]) -> dict:
        """Run the forwards and backwards of a step; return mean figures and the gradients' norm.

        Where `stop` says so, the first forward is the last: these gradients are not used. Raises
        UserError where the loss is no number.
        """
        config, device = self.config, self.accelerator.device
        self.choose(step)
        prices, shares = self.control.prices(step), self.control.shares(step)
        student = self.accelerator.unwrap_model(self.student)
        process = self.accelerator.process_index
        seen = []
        first = step * config.accumulate
        batches = [
            self._batch((first + micro) * self.accelerator.num_processes + process)
            for micro in range(config.accumulate)
        ]
        # The mean over forwards and devices of what each counts: so every token of the step weighs
        # the same.
        total = torch.stack([counts[:, 1:].sum() for _, counts, _ in batches]).float().mean()
        total = self.accelerator.reduce(total, "mean")
        for micro, batch in enumerate(batches):
            checkpoints.seed_step(config.seed, step, micro, process)
            last = micro + 1 == config.accumulate
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.student):
                with self.accelerator.autocast():
                    loss, figures = self.student(*batch, prices.to(device), shares, total)
                self.accelerator.backward(loss / config.accumulate)
            seen.append(
                figures | {"rise": student.group_offset.grad * (config.accumulate / self._scale())}
            )
            if not last and self._stopped(stop):
                break
        seen = {k: torch.stack([figures[k] for figures in seen]).mean(0) for k in seen[0]}
        seen = {k: v.float().cpu() for k, v in self.accelerator.reduce(seen, "mean").items()}
        norm = number(self.accelerator.clip_grad_norm_(self.trainable(), config.clip))
        scaled = self.accelerator.scaler is not None  # float16: a step that overflows is left out
        if not math.isfinite(seen["loss"]) or not (scaled or math.isfinite(norm)):
            raise self._not_finite(step)
        return seen | {"norm": norm}

    def _update(self, step: int, seen: dict) -> dict:
        """Move weights and thresholds; return the step's row of metrics."""
        rate = rate_at(step, self.steps, self.config.warmup)
        for group, rate_at_peak in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate_at_peak * rate
        prices, targets = self.control.prices(step), self.control.target(step)
        norm = seen.pop("norm")
        self.optimizer.step()
        self.optimizer.zero_grad()
        slopes = [seen.pop(name) for name in ("quantile", "rise", "slope")]
        if math.isfinite(norm):
            shift = self.control.update(step, *slopes)
            if self.config.method == "threshold":
                self._move(shift)
        told = {"target": targets.tolist(), "price": prices.tolist(), "rate": rate, "norm": norm}
        return {k: v.tolist() for k, v in seen.items()} | told

    def choose(self, step: int) -> None:
        """Set the share of a sequence that top-k takes at this step."""
        if self.config.method == "topk":
            kinds = [group[0][1] for group in self.control.groups]
            shares = dict(zip(kinds, self.control.target(step).tolist(), strict=True))
            self.model.strategy = TopK(shares)

    def _scale(self) -> float:
        """Return the scale of the gradients, which float16 has."""
        return 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()

    def _move(self, shift: torch.Tensor) -> None:
        """Add to the logits of each group's thresholds."""
        for group, more in zip(self.control.groups, shift.tolist(), strict=True):
            for unit in group:
                router = self.model.router(unit)
                logit = min(max(threshold_logit(router.threshold) + more, -MAX_LOGIT), MAX_LOGIT)
                router.threshold = logit_threshold(logit)

    def _batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the batch of the number-th forward of the run, three times [batch, length].

        These are the ids, the tokens whose loss counts, and the tokens whose activation counts.
        """
        n, items = len(self.train), []
        for i in range(number * self.config.batch, (number + 1) * self.config.batch):
            item = self.train[_order(n, self.config.seed, i // n)[i % n]]
            items.append(
                ask_for_passages(
                    self.model.tokenizer,
                    item,
                    self.config.recall,
                    self.config.seed,
                    i,
                    self.config.loss_on == "answers",
                )
            )
        device = self.accelerator.device
        return tuple(
            torch.stack([item[name] for item in items]).to(device)
            for name in ("input_ids", "loss", "novel")
        )

    def trainable(self) -> list[torch.nn.Parameter]:
        """Return the parameters that are trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Return figures of the hard decisions on the held-out text.

        The activation of each kind is that where the text does not repeat itself.
        """
        sums = torch.zeros(4, dtype=torch.float64)
        active, novel, share = 0.0, 0, 0.0
        windows = layer_windows(self.model.base)
        self.student.eval()
        for i in Progress().count("reading held-out text", range(len(self.held_out))):
            item = self.held_out[i]
            ids = item["input_ids"].to(self.accelerator.device)
            with self.accelerator.autocast():
                dense, logits, trace = self.student(ids[None])
            sums += divergence(dense[0].float().cpu(), logits[0].float().cpu(), ids.cpu())
            counts = counted(item["novel"])
            active = active + trace.active[0].cpu()[counts].float().sum(0)
            novel += int(counts.sum())
            share += visible_share(self.model.config, trace.active[0].cpu(), windows)
        n = len(self.held_out)
        kl, nll_dense, nll, same = (sums / (n * (self.config.length - 1))).tolist()
        of_unit = dict(zip(self.units, (active / novel).tolist(), strict=True))
        self.activation_held_out = of_unit
        activation = {
            kind: sum(of_unit[unit] for unit in units) / len(units)
            for kind, units in self.model.config.by_kind().items()
        }
        # Both may be infinite.
        of_dense, perplexity = torch.tensor([nll_dense, nll], dtype=torch.float64).exp().tolist()
        return {
            "kl": kl,
            "perplexity_dense": of_dense,
            "perplexity": perplexity,
            "top1_agreement": same,
            "activation": activation,
            "kv_share": share / n,
        }

    def save(self, step: int) -> None:
        """Write a checkpoint of a run of which `step` steps are done."""
        routers = [self.model.router(unit) for unit in self.units]
        state = {
            "step": step,
            "control": self.control.state_dict(),
            "run": self.identity,
            "thresholds": [router.threshold for router in routers],
            "buffers": [router.buffer_state() for router in routers],
        }
        if self.accelerator.scaler is not None:  # Only fp16 has a scaler.
            state["scaler"] = self.accelerator.scaler.state_dict()
        checkpoints.save(self.run, self.student, self.optimizer, state, self.main)

    def restore(self) -> int:
        """Put the checkpoint's state back; return its step."""
        state = checkpoints.load(self.run)
        checkpoints.check(state, self.identity)
        checkpoints.restore(self.student, self.optimizer, state)
        if self.accelerator.scaler is not None and "scaler" in state:
            # Another --precision may have been given before.
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.control.load_state_dict(state["control"])
        for unit, p, buffers in zip(self.units, state["thresholds"], state["buffers"], strict=True):
            router = self.model.router(unit)
            router.threshold = p
            router.load_buffer_state(buffers)
        return state["step"]

    def _not_finite(self, step: int) -> UserError:
        has = (self.run / checkpoints.NAME).is_file()
        kept = f"the last good checkpoint is in {self.run}" if has else "there is no checkpoint yet"
        return UserError(
            f"the loss is not a number at step {step + 1}; {kept}",
            f"{'--resume' if has else 'start again'} with lower learning rates, or --precision no",
        )


_order = functools.lru_cache(maxsize=2)(order)


def rate_at(step: int, steps: int, warmup: float) -> float:
    """Return the share of the learning rate at a step.

    The warm-up is linear; then the rate falls as a cosine to MIN_RATE_SHARE.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return MIN_RATE_SHARE + (1 - MIN_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


@contextlib.contextmanager
def stopping() -> Iterator[list[int]]:
    """Give a list that SIGTERM and SIGINT append to, so that the step is finished first.

    A second signal stops at once.
    """
    stop: list[int] = []

    def handler(number, _frame):
        if stop:
            os._exit(128 + number)
        stop.append(number)

    before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, former in before.items():
            signal.signal(number, former)
