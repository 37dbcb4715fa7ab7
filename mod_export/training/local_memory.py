"""What layer-local training takes of memory, computed from the shapes of model and texts.

    check(model.base, LocalPlan(sequences=14, length=2048))    # logs it, or refuses with a cure

Counted are the tensors that grow with the model or the texts. tests/unit/training/test_local.py
compares the result with what torch's operations hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from mod_export.calibration import memory
from mod_export.calibration.memory import GPU_LAYERS, Memory
from mod_export.common import memory_check
from mod_export.model.layer_walk import KEPT_BYTES
from mod_export.model.model_shape import ModelShape
from mod_export.training.memory import MemoryPlan, attention_bytes, backward_bytes
from mod_export.training.relaxation import CHUNK_QUERIES

TOLERANCE = 0.25  # the prediction is off by at most this share
SHORTEST = 256  # tokens of a sequence that a cure proposes


@dataclass(frozen=True)
class LocalPlan:
    """What memory depends on beside the model.

    sequences, length: of the texts that layers are taught on. longest, judged: tokens of a sequence
    that thresholds are chosen on, and of all of them. itemsize: bytes of a number that is computed.
    on_cpu: see MemoryPlan. processes: that share this machine.
    """

    sequences: int
    length: int
    longest: int = 0
    judged: int = 0
    itemsize: int = 4
    on_cpu: bool = True
    processes: int = 1


def needed(shape: ModelShape, plan: LocalPlan) -> Memory:
    """Return what the largest moment of a run takes.

    The outputs of a layer's attention are kept beside the residual streams, and stay in memory.
    """
    c, embd = plan.itemsize, shape.embd
    taught, judged = (n * embd * c for n in (plan.sequences * plan.length, plan.judged))
    walked = max(taught, judged)  # residual streams, of which many lie in a file
    of_attention = MemoryPlan(length=plan.length, weight_bytes=c, on_cpu=plan.on_cpu)
    rows = plan.length * embd * (4 * 4 + 3 * c)  # distances to the original, in float32
    learning = attention_bytes(shape, of_attention) + backward_bytes(shape, of_attention) + rows
    scores = shape.heads * CHUNK_QUERIES * (4 + c) + 6 * c * embd
    passing = max(plan.length, plan.longest) * max(3 * c * shape.ff + 4 * 4 * embd, scores)
    return Memory(
        weights=(1 if plan.on_cpu else GPU_LAYERS) * shape.in_layer * c,
        streams=taught + (walked if walked <= KEPT_BYTES else 0),
        layer=max(learning, passing),
        routers=3 * 8 * embd**2,
    )


def check(base: nn.Module, plan: LocalPlan) -> None:
    """Log what a run takes of memory.

    Raises UserError where there is less, with the options that help.
    """
    shape = ModelShape.of(base)
    helps, share = partial(_cure, shape, plan), plan.processes
    memory.tell("teaching layers", needed(shape, plan), base.device, TOLERANCE, helps, share)


def _cure(shape: ModelShape, plan: LocalPlan, names: Sequence[str], room: float) -> str:
    choices = ((options, needed(shape, less).of(names)) for options, less in _smaller(plan))
    return memory_check.mildest(choices, room, ", or fewer --tokens")


def _smaller(plan: LocalPlan) -> Iterator[tuple[str, LocalPlan]]:
    """Yield options that save memory, and the plan with them, the mildest first."""
    first = ""
    if plan.itemsize > 2:
        first, plan = "--dtype bfloat16 ", replace(plan, itemsize=2)
        yield first.strip(), plan
    elif plan.length < 2 * SHORTEST:
        yield "the same", plan
    length, n_token = plan.length, plan.sequences * plan.length
    while length // 2 >= SHORTEST:
        length //= 2
        shorter = replace(plan, length=length, sequences=-(-n_token // length))
        yield f"{first}--length {length}", shorter
