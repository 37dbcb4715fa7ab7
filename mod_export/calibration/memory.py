"""What a calibration takes of memory, computed from the shapes of model and texts, told before.

    check(base, plan, sequences, held_out)         # logs it, or refuses with what helps

Counted are the tensors that grow with the model or the texts. tests/unit/calibration/test_memory.py
compares the result with what torch's operations hold, docs/results/memory.md with whole processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from mod_export.calibration.costs import QUERY_BLOCK
from mod_export.calibration.measuring import CalibrationPlan, sample_numbers, sequences_joined
from mod_export.common import memory_check
from mod_export.common.system import available_memory
from mod_export.common.text import size
from mod_export.config import KV_WINDOW
from mod_export.model import streaming
from mod_export.model.layer_walk import KEPT_BYTES
from mod_export.model.model_shape import ModelShape
from mod_export.units import KV

# The prediction is off by at most this share (tests/unit/calibration/test_memory.py).
TOLERANCE = 0.25
GPU_LAYERS = 2  # the one that computes, and the next one
NAMES = {
    "weights": "a layer's weights",
    "streams": "hidden states",
    "layer": "what a layer computes",
    "routers": "fits of routers",
}


@dataclass(frozen=True)
class CalibrationShape:
    """What memory depends on beside the model.

    sequences, length: of the texts that costs are measured on. held_out: their number. joined: how
    many of them make a longer one. units: routers. heads: units of a layer. windows: that each can
    have. itemsize: bytes of a number that is computed. layers: of which the weights are read; 0
    where all are in memory already, 2 on a GPU, which gets the next one meanwhile. backward: a
    score needs a backward pass.
    """

    sequences: int
    length: int
    held_out: int = 1
    joined: int = 1
    units: int = 1
    heads: int = 1
    windows: int = 1
    itemsize: int = 4
    layers: int = 1
    backward: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes that a calibration takes.

    weights: of the layers that are read. streams: residual streams of all sequences, as far as
    they lie in memory. layer: what a layer computes of the sequences that take most. routers: the
    moments of a layer, and what the routers of all layers are chosen from.
    """

    weights: float
    streams: float
    layer: float
    routers: float

    def of(self, names: Iterable[str] = NAMES) -> float:
        """Return the bytes of some parts together."""
        return sum(getattr(self, name) for name in names)


def needed(shape: ModelShape, texts: CalibrationShape) -> Memory:
    """Return what the largest moment of a calibration takes."""
    c, embd, n_sample = texts.itemsize, shape.embd, len(sample_numbers(texts.sequences))
    longer = texts.sequences // texts.joined * texts.joined
    many = max(texts.sequences + longer, n_sample + texts.held_out)
    streams = many * texts.length * embd * c
    candidates = texts.units * texts.windows
    routers = candidates * 4 * (n_sample * texts.length + 2 * embd) + 5 * 8 * embd**2
    return Memory(
        weights=texts.layers * shape.in_layer * c,
        streams=streams if streams <= KEPT_BYTES else 0,
        layer=_layer_bytes(shape, texts),
        routers=routers,
    )


def _layer_bytes(shape: ModelShape, texts: CalibrationShape) -> float:
    """Bytes of what a layer computes: costs, the FFN of a longer sequence, or masks of heads."""
    c, width = texts.itemsize, shape.heads * shape.head_size
    longest = texts.joined * texts.length
    ffn = longest * (4 * c * shape.ff + 5 * c * shape.embd)
    block = 4 * shape.heads * QUERY_BLOCK * texts.length
    record = texts.length * (4 * 4 * width + 6 * c * shape.embd)
    costs = record + 4 * block + 4 * texts.length * texts.heads * texts.windows
    masks = texts.length**2 * _mask_bytes(shape, texts) + texts.length * 4 * c * width
    if texts.backward:
        kept = (shape.layers + 2) * texts.length * shape.embd * c
        logits = texts.length * shape.vocab * (2 * c + 2 * 4)
        costs = kept + max(logits, costs + texts.length * 3 * c * shape.ff + 4 * block)
    return max(ffn, costs, masks)


def _mask_bytes(shape: ModelShape, texts: CalibrationShape) -> float:
    """Bytes that masks take of each pair of tokens: distances, planes of heads and of windows."""
    by_head = texts.heads > 1
    heads, heads_kv = (shape.heads, shape.heads_kv) if by_head else (1, 1)
    # On a GPU torch makes numbers of the planes.
    added = 0 if texts.layers < GPU_LAYERS else heads * texts.itemsize
    return 6 + texts.windows + 3 * heads_kv + 3 * heads + added


def check(
    base: nn.Module, plan: CalibrationPlan, sequences: torch.Tensor, held_out: torch.Tensor
) -> None:
    """Log what a calibration takes of memory.

    sequences, held_out: [n, T]. Raises UserError where there is less, with the options that help.
    """
    shape, texts = ModelShape.of(base), _texts_of(base, plan, sequences, held_out)
    helps = partial(cure, shape, texts, plan)
    tell("calibrating", needed(shape, texts), base.device, TOLERANCE, helps)


def tell(
    work: str,
    need: Memory,
    device: torch.device,
    tolerance: float,
    cure: Callable[[Sequence[str], float], str],
    share: int = 1,
) -> None:
    """Log what some work, with one layer in memory at a time, takes of each memory.

    work: as the subject of a sentence. tolerance, cure: as common/memory_check.py has them; cure is
    called with the parts of Memory that lie in one place, and with the bytes that are left there.
    share: processes that this machine's memory is for. Raises UserError where the work cannot fit.
    """
    for where, names, room in _places(device, share):
        total = need.of(names)
        parts = ", ".join(f"{NAMES[name]} {size(need.of([name]))}" for name in names)
        says = f"{work} takes about {size(total)} of {where} ({parts}), and {size(room)} are left"
        memory_check.tell(says, total, room, tolerance, partial(cure, names, room))


def cure(
    shape: ModelShape,
    texts: CalibrationShape,
    plan: CalibrationPlan,
    names: Sequence[str],
    room: float,
) -> str:
    """Return the options with which a calibration fits, or what it takes with all of them.

    names: of the parts of Memory that lie where there is that much room.
    """
    choices = _smaller(texts, plan)
    return memory_check.mildest(
        ((options, needed(shape, less).of(names)) for options, less in choices), room
    )


def _places(device: torch.device, share: int = 1) -> list[tuple[str, tuple[str, ...], float]]:
    """Return the memories, with the parts of Memory in each of them and its room in bytes."""
    here = available_memory() // share
    if device.type != "cuda":
        return [("memory", ("weights", "streams", "layer", "routers"), here)]
    return [
        (f"the memory of {device}", ("weights", "layer"), torch.cuda.mem_get_info(device)[0]),
        ("memory", ("streams", "routers"), here),
    ]


def _smaller(
    texts: CalibrationShape, plan: CalibrationPlan
) -> Iterator[tuple[str, CalibrationShape]]:
    """Yield options that save memory, and what is measured with them, the mildest first."""
    options: list[str] = []
    if texts.itemsize > 2:
        options.append("--dtype bfloat16")
        texts = replace(texts, itemsize=2)
        yield " ".join(options), texts
    if plan.kv_window is None and KV in plan.units:
        options.append(f"--kv-window {KV_WINDOW}")
        length = min(texts.length, 4 * KV_WINDOW)
        n = texts.sequences * texts.length // length
        texts = replace(texts, windows=1, length=length, sequences=n)
        yield " ".join(options), texts
    if texts.sequences > 1:
        options.append(f"--calibration-tokens {texts.length}")
        yield " ".join(options), replace(texts, sequences=1, held_out=1, joined=1)
    if not options:
        yield "this", texts


def _texts_of(
    base: nn.Module, plan: CalibrationPlan, sequences: torch.Tensor, held_out: torch.Tensor
) -> CalibrationShape:
    n, length = sequences.shape
    heads = plan.heads(base, KV) if KV in plan.units else 1
    units = sum(len(layers) * plan.heads(base, kind) for kind, layers in plan.units.items())
    on_device = GPU_LAYERS if base.device.type == "cuda" else 1
    return CalibrationShape(
        sequences=n,
        length=length,
        held_out=len(held_out),
        joined=sequences_joined(base, length, n),
        units=units,
        heads=heads,
        windows=len(plan.windows) if KV in plan.units else 1,
        itemsize=base.dtype.itemsize,
        layers=0 if streaming.source_of(base) is None else on_device,
        backward=plan.needs_gradients,
    )
