"""The steps of a training run, on one device or many through Accelerate.

Knows nothing of files of models: train.py makes what it works on, and writes what comes out.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mod_export.calibration.thresholds import MAX_LOGIT
from mod_export.data.packing import PackedData, order
from mod_export.data.repeats import counted
from mod_export.errors import UserError
from mod_export.evaluation import run as eval_run
from mod_export.model.router import logit_threshold, threshold_logit
from mod_export.model.routing import TopK
from mod_export.training import checkpoints
from mod_export.training.config import TrainConfig
from mod_export.training.controller import Controller
from mod_export.training.log import Log
from mod_export.training.passages import recall
from mod_export.training.relaxation import relaxed_attention
from mod_export.training.sharding import number
from mod_export.training.student import Student

logger = logging.getLogger(__name__)

MIN_RATE = 0.1  # of the learning rate, at the end of its decay


@dataclass
class Loop:
    """student, optimizer: prepared by `accelerator`; identity: what a checkpoint must agree with."""

    config: TrainConfig
    accelerator: object
    student: Student
    optimizer: torch.optim.Optimizer
    control: Controller
    train: PackedData
    held_out: PackedData
    run: Path
    identity: dict
    settled: dict = field(
        default_factory=dict
    )  # activation of each unit when thresholds were last chosen
    active: dict = field(default_factory=dict)  # on the held-out text, when that was last looked at

    def __post_init__(self):
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.model = self.accelerator.unwrap_model(self.student).model
        self.units = self.model.config.routed()
        self.main = self.accelerator.is_main_process
        processes = self.accelerator.num_processes
        self.steps = self.config.steps(processes)
        self.tokens = (
            self.config.length * self.config.batch * self.config.accumulate * processes
        )  # of a step

    def go(self, first: int = 0, halfway: Callable[[int], None] = lambda step: None) -> None:
        """Run the steps after `first`. Raises UserError where the loss is no number, SystemExit
        after SIGTERM.

        halfway: called with the number of steps done when half of them are.
        """
        log = Log(self.run, self.steps, first, self.control.names) if self.main else None
        try:
            with relaxed_attention(self.model.base), stopping() as stop:
                self._steps(first, halfway, log, stop)
        finally:
            if log:
                log.close()

    def _steps(
        self, first: int, halfway: Callable[[int], None], log: Log | None, stop: list[int]
    ) -> None:
        figures = {}
        for step in range(first, self.steps):
            if step == self.steps // 2 != first:  # a checkpoint of this step is written after it
                with log.aside() if log else contextlib.nullcontext():
                    halfway(step)
            seen = self._gradients(step, stop)
            # not before a loss has seen the weights: a step may have spoilt them
            if self._stopped(stop):
                self.save(step)
                self._stop(step, stop)
            if step % self.config.save_every == 0 and step > first:
                self.save(step)
            row = self._update(step, seen)
            if log:
                log.step({"step": step + 1, **row}, self.tokens)
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
        """Has any process been told to?"""
        return bool(
            self.accelerator.reduce(torch.tensor(float(bool(stop)), device=self.accelerator.device))
            > 0
        )

    def _stop(self, step: int, stop: list[int]) -> None:
        logger.info(f"stopped after step {step} of {self.steps}; go on with --resume")
        raise SystemExit(128 + (stop[0] if stop else signal.SIGTERM))

    def _gradients(self, step: int, stop: list[int]) -> dict:
        """Forwards and backwards of a step; -> their mean figures, with the gradients' norm. After
        the first, none more where `stop` says so: these gradients are not used. Raises UserError
        where the loss is no number.
        """
        config, device = self.config, self.accelerator.device
        self.choose(step)
        prices, shares = self.control.prices(step), self.control.shares(step)
        seen, student, process = (
            [],
            self.accelerator.unwrap_model(self.student),
            self.accelerator.process_index,
        )
        first = step * config.accumulate
        batches = [
            self._batch((first + micro) * self.accelerator.num_processes + process)
            for micro in range(config.accumulate)
        ]
        # mean over forwards and devices of what each counts: so every token weighs the same in the
        # step
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
        """Move weights and thresholds; -> the step's row of metrics."""
        rate = rate_at(step, self.steps, self.config.warmup)
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = base * rate
        prices, targets, norm = (
            self.control.prices(step),
            self.control.target(step),
            seen.pop("norm"),
        )
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
        """The share of a sequence that top-k takes at this step."""
        if self.config.method == "topk":
            kinds = [group[0][1] for group in self.control.groups]
            shares = dict(zip(kinds, self.control.target(step).tolist(), strict=True))
            self.model.strategy = TopK(shares)

    def _scale(self) -> float:
        """Of the gradients, in float16."""
        return 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()

    def _move(self, shift: torch.Tensor) -> None:
        """Add to the logits of each group's thresholds."""
        for group, more in zip(self.control.groups, shift.tolist(), strict=True):
            for unit in group:
                router = self.model.router(unit)
                logit = min(max(threshold_logit(router.threshold) + more, -MAX_LOGIT), MAX_LOGIT)
                router.threshold = logit_threshold(logit)

    def _batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the number-th forward of the run, [batch, length] each: ids, tokens whose loss and
        whose activation count.
        """
        n, items = len(self.train), []
        for i in range(number * self.config.batch, (number + 1) * self.config.batch):
            item = self.train[_order(n, self.config.seed, i // n)[i % n]]
            items.append(
                recall(
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
            for name in ("input_ids", "loss", "fresh")
        )

    def trainable(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Hard decisions on the held-out text: KL, perplexities, agreement, activation of each kind
        where the text does not repeat itself, K/V of dense.
        """
        sums, active, fresh, share = torch.zeros(4, dtype=torch.float64), 0.0, 0, 0.0
        self.student.eval()
        for i in range(len(self.held_out)):
            item = self.held_out[i]
            ids = item["input_ids"].to(self.accelerator.device)
            with self.accelerator.autocast():
                dense, logits, trace = self.student(ids[None])
            sums += eval_run.divergence(dense[0].float().cpu(), logits[0].float().cpu(), ids.cpu())
            counts = counted(item["fresh"])
            active = active + trace.active[0].cpu()[counts].float().sum(0)
            fresh += int(counts.sum())
            share += eval_run.kv_share(self.model.config, trace.active[0].cpu(), self.model.n_layer)
        n = len(self.held_out)
        kl, nll_dense, nll, same = (sums / (n * (self.config.length - 1))).tolist()
        of_unit = dict(zip(self.units, (active / fresh).tolist(), strict=True))
        self.active = of_unit
        activation = {
            kind: sum(of_unit[unit] for unit in units) / len(units)
            for kind, units in self.model.config.by_kind().items()
        }
        of_dense, perplexity = (
            torch.tensor([nll_dense, nll], dtype=torch.float64).exp().tolist()
        )  # may be infinite
        return {
            "kl": kl,
            "perplexity_dense": of_dense,
            "perplexity": perplexity,
            "top1_agreement": same,
            "activation": activation,
            "kv_share": share / n,
        }

    def save(self, step: int) -> None:
        """A checkpoint from which `step` steps are done."""
        routers = [self.model.router(unit) for unit in self.units]
        state = {
            "step": step,
            "control": self.control.state_dict(),
            "run": self.identity,
            "thresholds": [router.threshold for router in routers],
            "buffers": [router.buffer_state() for router in routers],
        }
        if self.accelerator.scaler is not None:  # of fp16
            state["scaler"] = self.accelerator.scaler.state_dict()
        checkpoints.save(self.run, self.student, self.optimizer, state, self.main)

    def restore(self) -> int:
        """Put the checkpoint's state back; -> its step."""
        state = checkpoints.load(self.run)
        checkpoints.check(state, self.identity)
        checkpoints.restore(self.student, self.optimizer, state)
        if (
            self.accelerator.scaler is not None and "scaler" in state
        ):  # --precision may have changed
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
    """Share of the learning rate at a step: linear warm-up, then cosine decay to MIN_RATE."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return MIN_RATE + (1 - MIN_RATE) * 0.5 * (1 + math.cos(math.pi * done))


@contextlib.contextmanager
def stopping() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT append to: the step is finished first. A second signal stops
    at once.
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
