"""Whether a training run fits in the memory of its device, told before it begins.

check("adapter", None, config, torch.bfloat16, accelerator)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mod_export import adapter
from mod_export.calibration.measuring import LONG_TOKENS
from mod_export.common import memory_check
from mod_export.common.system import available_memory
from mod_export.common.text import size
from mod_export.config import MoDConfig
from mod_export.model import architectures, loading
from mod_export.model.model_shape import ModelShape
from mod_export.model.safetensors_weights import CannotStream
from mod_export.training import devices
from mod_export.training.config import TrainConfig
from mod_export.training.memory import TOLERANCE, Memory, MemoryPlan, needed

logger = logging.getLogger(__name__)

SHORTEST = 256  # tokens of a sequence that a cure proposes


def check(
    name: str,
    weights: str | Path | None,
    config: TrainConfig,
    dtype: torch.dtype,
    accelerator: Any,
) -> None:
    """Log what training takes of the device's memory.

    name, weights: of the adapter or MoD directory, as adapter.open_model takes them. dtype: of the
    weights that are not trained. Raises UserError where the device has less, with the options that
    make the run fit.
    """
    try:
        base, mod = adapter.open_streamed(name, weights, dtype)
    except CannotStream:
        return  # its layers are not known before it is loaded
    shape, room = ModelShape.of(base), room_of(accelerator)
    plan = plan_of(base, mod, config, dtype, accelerator)
    need = needed(shape, plan)
    says = f"training takes about {size(need.total)} of memory ({_parts(need)}), and "
    says += f"{accelerator.device} has {size(room)} left"
    helps = partial(cure, shape, plan, room)
    memory_check.tell(says, need.total, room, TOLERANCE, helps)


def plan_of(
    base: nn.Module, mod: MoDConfig, config: TrainConfig, dtype: torch.dtype, accelerator: Any
) -> MemoryPlan:
    """Return what the memory of a run depends on; base: a model, without weights too."""
    units = mod.routed()
    context = architectures.context_length(base) or LONG_TOKENS
    teacher = ModelShape.of(base).parameters if config.parameters == "full" else 0
    if config.teacher:
        teacher = loading.weights_bytes(config.teacher, dtype) // dtype.itemsize
    return MemoryPlan(
        batch=config.batch,
        length=config.length,
        longest=max(config.length, min(LONG_TOKENS, context)),
        weight_bytes=dtype.itemsize,
        four_bit=config.four_bit,
        autocast=accelerator.mixed_precision != "no",
        recompute=config.recompute,
        parameters=config.parameters,
        lora_rank=config.lora_rank,
        units=len(units),
        first=min((unit.layer for unit in units), default=0),
        teacher=teacher,
        pieces=accelerator.num_processes if devices.is_sharded(accelerator) else 1,
        on_cpu=accelerator.device.type == "cpu",
    )


def room_of(accelerator: Any) -> int:
    """Return the bytes that each process can take of its device."""
    if accelerator.device.type == "cuda":
        return torch.cuda.mem_get_info(accelerator.device)[0]
    return available_memory() // processes_here(accelerator)


def processes_here(accelerator: Any) -> int:
    """Return how many of the processes of a run share the memory of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)


def tell_peak(device: torch.device) -> None:
    """Log what a run has taken of a GPU, to be compared with what was said before."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
        logger.info(f"training took {size(peak)} of memory at most, without CUDA's own")


def cure(shape: ModelShape, plan: MemoryPlan, room: int) -> str:
    """Return the options with which a run fits, or else what more it takes."""
    more = "" if plan.on_cpu else ", or share the weights out among more GPUs (FSDP)"
    choices = ((options, needed(shape, less).total) for options, less in _smaller(plan))
    return memory_check.mildest(choices, room, more)


def _smaller(plan: MemoryPlan) -> Iterator[tuple[str, MemoryPlan]]:
    """Yield options that save memory, and the plan with them, those that cost least first."""
    options: list[str] = []

    def add(text: str, **changes) -> tuple[str, MemoryPlan]:
        nonlocal plan
        options.append(text)
        plan = replace(plan, **changes)
        return " ".join(options), plan

    if not plan.recompute:
        yield add("--recompute", recompute=True)
    if plan.weight_bytes > 2 and plan.parameters != "full":
        yield add("--dtype bfloat16", weight_bytes=2)
    if plan.batch > 1:
        yield add(f"--batch 1 --accumulate {plan.batch}", batch=1)
    if not (plan.four_bit or plan.on_cpu or plan.pieces > 1 or plan.parameters == "full"):
        yield add("--four-bit --save adapter", four_bit=True)
    length = plan.length
    while length // 2 >= SHORTEST:
        length //= 2
        kept = [text for text in options if not text.startswith("--length")]
        options[:] = kept
        yield add(f"--length {length}", length=length)
    if not options:
        yield "the same", plan


def _parts(need: Memory) -> str:
    names = {
        "weights": "weights",
        "trained": "what is trained",
        "activations": "activations",
        "logits": "logits",
    }
    return ", ".join(f"{text} {size(getattr(need, name))}" for name, text in names.items())
