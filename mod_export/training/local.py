"""Train kv routers layer by layer, each by what its own attention loses (`train --local`).

    train_local("adapter", "trained", TrainConfig(data=("texts/",), target=0.25))

One layer is in memory at a time, and no backward pass goes through the model. The residual streams
of the sequences are kept, and carried from layer to layer. Each layer keeps the share of the
activation that calibration gave it; at the end one threshold meets the target. Of several processes
(torchrun, accelerate launch) each teaches its share of the layers, and takes the sequences through
the others.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from mod_export import adapter
from mod_export.calibration.measuring import sequences_joined
from mod_export.calibration.thresholds import routing, settle
from mod_export.common.files import check_dir
from mod_export.common.progress import stage
from mod_export.data.packing import PackedData, order
from mod_export.data.repeats import counted
from mod_export.errors import UserError
from mod_export.formats import adapter_files, hub
from mod_export.model import loading
from mod_export.model.layer_walk import LayerWalk
from mod_export.model.mod_model import MoDModel
from mod_export.model.router import Router, threshold_logit
from mod_export.model.safetensors_weights import CannotStream
from mod_export.model.walk_state import WalkState
from mod_export.training import devices, environment, local_memory, room
from mod_export.training.callbacks import THRESHOLD_TOKENS, long_sequences
from mod_export.training.config import TrainConfig, default_of
from mod_export.training.local_layer import LocalLayer
from mod_export.training.local_memory import LocalPlan
from mod_export.training.passages import ask_for_passages
from mod_export.training.relaxation import HardDecisions, relaxed_attention
from mod_export.training.run import Output, alone, data_of, one_voice, with_length
from mod_export.units import KV, Unit

logger = logging.getLogger(__name__)

# The options that mean something here. Others have to stay as they are.
OPTIONS = (
    *("data", "target", "tokens", "length", "limit", "recall", "held_out", "drift_penalty"),
    *("temperature", "router_lr", "warmup", "device", "dtype", "seed"),
)
# Processes wait for one another so long: a share of the layers of a large model takes days.
PATIENCE = timedelta(days=30)
JUDGES = 2  # held-out sequences that show what a layer's routers lose


def train_local(
    directory: str,
    out: str,
    config: TrainConfig,
    save_as: str | None = None,
    resume: bool = False,
    force: bool = False,
    base: str | Path | None = None,
) -> None:
    """Teach the kv routers of `directory`, and write the adapter `out`.

    The arguments are those of run.train. Of several processes the main one alone logs and writes.
    Raises UserError for anything that does not fit.
    """
    check_options(config)
    if save_as == "full":
        raise UserError("--local writes an adapter", "leave out --save full, then use export")
    output = Output(Path(out), "adapter", resume, force)
    check_dir(output.path, force)
    device = devices.choose(config.device, environment.processes(os.environ))
    waiting = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[waiting])
    main = accelerator.is_main_process
    with one_voice(main):
        config = with_length(directory, config)
        weights = adapter_files.weights_of(directory, base)
        dtype = devices.weights_type(config, loading.stored_type(weights), device, "no")
        model, identity = _open(directory, weights, dtype, accelerator.device)
        check_model(directory, model, config)
        with accelerator.main_process_first():  # the others find the tokens in the cache
            data = data_of(model, config)
        lesson = Lesson(model, config, *data, accelerator)
        local_memory.check(model.base, lesson.plan())
        output.run.mkdir(exist_ok=True)
        with alone(output.run) if main else nullcontext():
            found = _taught(output, lesson, identity)
            for routers in gather_object([found]):
                lesson.put(routers)
            if main:
                _finish(lesson, output, identity, hub.reference(weights))
        accelerator.wait_for_everyone()


def check_options(config: TrainConfig) -> None:
    """Raise UserError for an option that layer-local training has no use for."""
    for name, value in config.to_dict().items():
        if name not in OPTIONS and value != default_of(name):
            raise UserError(
                f"--{name.replace('_', '-')} means nothing with --local", "leave one of them out"
            )


class Lesson:
    """The layers that this process teaches, and what it teaches them on."""

    def __init__(
        self,
        model: MoDModel,
        config: TrainConfig,
        data: PackedData,
        held_out: PackedData,
        accelerator: Accelerator,
    ):
        self.model, self.config, self.data = model, config, data
        self.accelerator = accelerator
        self.layers = {place.layer: units for place, units in model.config.by_layer().items()}
        rank, world = accelerator.process_index, accelerator.num_processes
        self.own = sorted(self.layers)[rank::world]
        n, numbers = config.steps(), order(len(data), config.seed, 0)
        if n > len(data):
            raise UserError(
                f"{config.tokens} tokens are more than the data have, {data.tokens}",
                "use fewer --tokens, or give more data",
            )
        items = [
            ask_for_passages(model.tokenizer, data[k], config.recall, config.seed, i)
            for i, k in enumerate(numbers[:n])
        ]
        self.learnt = n
        self.items = items + [held_out[i] for i in range(min(JUDGES, len(held_out)))]

    def plan(self) -> LocalPlan:
        """Return what the memory of the run depends on."""
        length, base = self.config.length, self.model.base
        return LocalPlan(
            sequences=len(self.items),
            length=length,
            longest=length * sequences_joined(base, length, len(self.data)),
            judged=min(self.data.tokens, THRESHOLD_TOKENS),
            itemsize=base.dtype.itemsize,
            on_cpu=base.device.type == "cpu",
            processes=room.processes_here(self.accelerator),
        )

    def teach(self, state: WalkState) -> dict[tuple, tuple]:
        """Return weight and bias of the routers of the own layers, by unit.

        state: goes on where it stopped, and keeps what is learnt.
        """
        one_threshold(self.model)
        found, shares = state.found, self.shares()
        ids = [item["input_ids"] for item in self.items]
        novel = [counted(item["novel"]) for item in self.items]
        stop = max(self.own, default=-1) + 1
        if state.layer < stop:
            layers = ", ".join(map(str, self.own))
            logger.info(f"teaching layers {layers} on {self.learnt * len(ids[0])} tokens")
            with torch.no_grad():
                walk = LayerWalk(self.model.base, ids)
            with relaxed_attention(self.model.base):
                for layer in walk.layers(stop, "teaching layers", state):
                    if layer in self.own:
                        part = LocalLayer(self.model, walk, self.layers[layer], novel, self.learnt)
                        found |= part.taught(self.config, shares[layer])
                    with torch.no_grad():
                        for number in range(len(ids)):
                            walk.pass_layer(number)
        return {unit: pair for unit, pair in found.items() if isinstance(unit, tuple)}

    def shares(self) -> dict[int, float]:
        """Return the activation that each layer is to keep, in the proportions of calibration."""
        activation, units = self.model.config.activation, self.model.config.routed()
        mean = sum(activation(unit) for unit in units) / len(units)
        factor = self.config.target_of(KV) / mean
        return {
            layer: min(0.99, factor * sum(activation(unit) for unit in some) / len(some))
            for layer, some in self.layers.items()
        }

    def put(self, routers: dict[tuple, tuple]) -> None:
        """Put routers that were taught in their places."""
        for unit, (weight, bias) in routers.items():
            before = self.model.router(Unit(*unit))
            router = Router(weight, bias, before.threshold, before.eps)
            self.model.replace_router(Unit(*unit), router.to(self.model.base.device))

    def meet_target(self) -> dict[Unit, float]:
        """Choose the one threshold, and return the activation of each unit."""
        sequences, novel = long_sequences(self.model, self.data, THRESHOLD_TOKENS)
        groups, target = {KV: self.model.config.routed()}, {KV: self.config.target_of(KV)}

        def route():
            traces = self.model.traces([*sequences], "measuring activation", None, HardDecisions())
            return routing(self.model, traces, counted(novel))

        with relaxed_attention(self.model.base):
            return settle(self.model, route, groups, target)


def one_threshold(model: MoDModel) -> None:
    """Give all routers the threshold of the first one, their biases shifted by the difference."""
    units = model.config.routed()
    common = model.router(units[0]).threshold
    for unit in units:
        router = model.router(unit)
        with torch.no_grad():
            router.bias += threshold_logit(common) - threshold_logit(router.threshold)
        router.threshold = common


def check_model(directory: str, model: MoDModel, config: TrainConfig) -> None:
    """Raise UserError where the units of a model cannot be taught by their layers."""
    if set(model.config.units) != {KV}:
        kinds = ", ".join(model.config.units) or "nothing"
        raise UserError(
            f"--local teaches kv units, and {directory} routes {kinds}", "leave out --local"
        )
    if not model.config.base_is_original:
        raise UserError(
            f"the weights of {directory} are trained, so they are not the original's",
            "begin with an adapter of routers alone",
        )
    config.validate([KV])


def _open(directory: str, weights: Path, dtype: torch.dtype, device) -> tuple[MoDModel, dict]:
    """Return a model whose layers are read when they run, and the identity of its base."""
    logger.info(f"loading {directory}")
    with stage(f"loading {directory}"):
        found = adapter.load(adapter_files.resolve(directory))
        if found.lora is not None:
            raise UserError(
                f"{directory} has LoRA, which goes into the weights of all layers",
                "begin with an adapter of routers alone",
            )
        try:
            base, tokenizer = loading.open_streamed(weights, dtype, device)
        except CannotStream as exc:
            raise UserError(
                f"--local reads {weights} layer by layer, which cannot be: {exc}",
                "get the model as safetensors files, or leave out --local",
            ) from exc
        model = adapter.apply(found, base, tokenizer)
    return model.requires_grad_(False), found.base


def _taught(output: Output, lesson: Lesson, identity: dict) -> dict[tuple, tuple]:
    """Return what the layers of this process have learnt."""
    state = _state(output, lesson, identity)
    try:
        return lesson.teach(state)
    except KeyboardInterrupt:
        if state.layer:
            logger.info(f"{output.run} has the layers before {state.layer}: go on with --resume")
        raise


def _state(output: Output, lesson: Lesson, identity: dict) -> WalkState:
    """Return what the run has reached. Raises UserError for a run with other options."""
    accelerator = lesson.accelerator
    name = f"layers-{accelerator.process_index + 1}-of-{accelerator.num_processes}"
    path = output.run / f"{name}.pt"
    if path.exists() and not output.resume:
        if not output.force:
            raise UserError(
                f"{output.run} holds the layers of a run",
                "go on with --resume, or use --force to replace them",
            )
        path.unlink()
    state = WalkState(output.run, name)
    options = {k: v for k, v in lesson.config.to_dict().items() if k not in ("data", "device")}
    start = {
        ".".join(map(str, unit)): weight.sum().item()
        for unit, (weight, _) in lesson.model.router_tensors().items()
    }
    what = {"options": options, "base": identity, "data": lesson.data.fingerprint, "start": start}
    told = json.dumps(what, sort_keys=True)
    if state.found.setdefault("run", told) != told:
        raise UserError(
            f"{output.run} is of a run with another model, other data or other options",
            "give the same, or begin again with --force",
        )
    return state


def _finish(lesson: Lesson, output: Output, identity: dict, origin: str) -> None:
    """Choose thresholds, and write the adapter."""
    model, config = lesson.model, lesson.config
    activation = lesson.meet_target()
    unit = model.config.units[KV]
    thresholds = {one: model.router(one).threshold for one in activation}
    training = {**config.to_dict(), "data": [Path(p).name for p in config.data], "local": True}
    changed = replace(
        model.config,
        units={KV: unit.with_values(thresholds, activation)},
        calibration={**model.config.calibration, "training": training},
    ).validate(model.n_layer)
    routers = model.router_tensors()
    adapter.save(
        output.path, changed, routers, model.base, identity, force=output.force, model=origin
    )
    logger.info(f"{output.path} is written; {output.run} holds what each layer learnt")
