"""What a training run takes of a device's memory, computed from the shape of the model.

    shape = ModelShape.of(base)                          # the weights may be on the device `meta`
    need = needed(shape, MemoryPlan(length=2048, weight_bytes=2, recompute=True))
    need.total, need.weights, need.activations

What is counted are the tensors that grow with the model, the batch or the length. The layers are
taken for those of Llama, with attention and a gated FFN. tests/unit/training/test_memory.py
compares the result with what torch's operations hold.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from mod_export.model.model_shape import ModelShape
from mod_export.training.losses import CPU_ROWS, ROWS
from mod_export.training.relaxation import CHUNK_QUERIES

# The prediction is off by at most this share. On small models it was off by 10 %, and by 17 % where
# little but one layer is kept (tests/unit/training/test_memory.py).
TOLERANCE = 0.2
# Bytes of a weight in 4 bits: NF4 of bitsandbytes, whose scales of 64 weights have 8 bits each and
# a scale in float32 for 256 of them. Source: QLoRA, arXiv 2305.14314.
FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes of a trained number: the weight, its gradient and two moments of AdamW, in float32.
TRAINED_BYTES = 16
# What CUDA and its libraries take of a GPU before the first tensor, about.
CUDA_BYTES = 600 << 20
# Rows [n_embd] in float32 that the routers of a layer have beside their weights
# (steady_router.py): what drifts, and its correction, of some 100 chunks of text.
ROUTER_ROWS = 200
# Numbers for each entry of the rows that losses.py compares at a time.
LOSS_COPIES = 4
# Layers that FSDP has whole at a time: the one that runs, and the next one.
WHOLE_LAYERS = 2


@dataclass(frozen=True)
class MemoryPlan:
    """What memory depends on beside the shape.

    batch, length: of a forward. longest: tokens of the sequences that thresholds are chosen on.
    weight_bytes: of a weight that is not trained. four_bit: those of linear modules have 4 bits.
    autocast: products are in 16 bits. recompute: layers are computed again in the backward pass.
    parameters: what is trained, as TrainConfig has it. units: routers. first: the first layer that
    has one. teacher: parameters of a model that teaches beside this one. pieces: devices that hold
    a piece of each weight (FSDP). on_cpu: torch keeps the attention weights for the backward pass
    there, and on a GPU what is added to the scores.
    """

    batch: int = 1
    length: int = 512
    longest: int = 4096
    weight_bytes: int = 4
    four_bit: bool = False
    autocast: bool = False
    recompute: bool = False
    parameters: str = "routers"
    lora_rank: int = 16
    units: int = 0
    first: int = 1
    teacher: int = 0
    pieces: int = 1
    on_cpu: bool = False

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number that a product gives."""
        return 2 if self.autocast else self.weight_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes of one device.

    weights: of model and teacher. trained: of routers and LoRA, or of all weights, with gradients,
    moments and what routers have beside. activations: what the backward pass needs of all layers,
    and what one layer takes while it runs. logits: of student and teacher, and their gradient.
    other: of the device's libraries.
    """

    weights: int
    trained: int
    activations: int
    logits: int
    other: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


def needed(shape: ModelShape, plan: MemoryPlan) -> Memory:
    """Return what the largest moment of a run takes of one device.

    That is the end of a forward, when the logits are compared, or the backward pass of a layer, or
    an evaluation.
    """
    tokens = plan.batch * plan.length
    attention = plan.batch * attention_bytes(shape, plan)
    of_layer = _layer_bytes(shape, plan) + _cast_bytes(shape.in_linear / shape.layers, plan)
    # Layers before the first router need no gradient where routers alone are trained.
    layers = shape.layers - (plan.first if plan.parameters == "routers" else 0)
    if plan.recompute:
        kept = layers * tokens * shape.embd * plan.weight_bytes
    else:
        kept = layers * of_layer + (shape.layers - plan.first) * attention
    kept += _cast_bytes(shape.vocab * shape.embd, plan) + tokens * shape.embd * 4
    logits = _logits_bytes(shape, plan)
    passing = backward_bytes(shape, plan) + (of_layer + attention if plan.recompute else 0)
    evaluation = _evaluation_bytes(shape, plan)
    most = max(kept + logits, kept + passing, evaluation)
    activations = min(most, max(kept, most - logits))
    return Memory(
        weights=round(_weights_bytes(shape, plan)),
        trained=round(_trained_bytes(shape, plan)),
        activations=round(activations),
        logits=round(most - activations),
        other=0 if plan.on_cpu else CUDA_BYTES,
    )


def _weights_bytes(shape: ModelShape, plan: MemoryPlan) -> float:
    """Bytes of the weights of model and teacher, of which FSDP has some whole."""
    in_linear = shape.in_linear * (FOUR_BIT_BYTES if plan.four_bit else plan.weight_bytes)
    outside = shape.outside * plan.weight_bytes
    layers = in_linear + (shape.in_layers - shape.in_linear) * plan.weight_bytes
    of_all = layers + outside + plan.teacher * plan.weight_bytes
    if plan.pieces == 1:
        return of_all
    return of_all / plan.pieces + outside + WHOLE_LAYERS * layers / shape.layers


def _trained_bytes(shape: ModelShape, plan: MemoryPlan) -> float:
    """Bytes of what is trained, beside weights of the model that are trained themselves."""
    numbers = plan.units * (shape.embd + 1)
    n_bytes = TRAINED_BYTES * numbers + ROUTER_ROWS * 4 * shape.layers * shape.embd
    if plan.parameters == "lora":
        n_bytes += TRAINED_BYTES * plan.lora_rank * shape.features
    elif plan.parameters == "full":
        n_bytes += (TRAINED_BYTES - 4) * shape.in_layers
    return n_bytes / plan.pieces


def _cast_bytes(weights: float, plan: MemoryPlan) -> float:
    """Bytes of the copies in 16 bits that autocast makes of weights, for the backward pass."""
    return 2 * weights if plan.autocast and plan.weight_bytes == 4 and not plan.four_bit else 0


def _layer_bytes(shape: ModelShape, plan: MemoryPlan) -> float:
    """Bytes that the backward pass of one layer needs, without its weights and its attention."""
    c, tokens = plan.compute_bytes, plan.batch * plan.length
    values = 2 * 4 * shape.embd + 3 * c * shape.ff  # norms compute in float32
    if plan.parameters != "routers":
        values += _input_bytes(shape, plan)
    return tokens * values


def _input_bytes(shape: ModelShape, plan: MemoryPlan) -> float:
    """Bytes of the inputs of the linear modules of a layer, of a token: they train weights."""
    inputs = shape.inputs / shape.layers
    if plan.autocast:
        return 2 * inputs  # each module casts its own
    if plan.weight_bytes == 2:
        return 4 * inputs  # so does LoRA, to float32
    return 4 * (inputs - 3 * shape.embd)  # q, k and v share one, gate and up another


def attention_bytes(shape: ModelShape, plan: MemoryPlan) -> float:
    """Bytes that the backward pass of one attention needs of a sequence (relaxation.py).

    The queries come in chunks, each with the keys up to its last query.
    """
    stops = [*range(CHUNK_QUERIES, plan.length, CHUNK_QUERIES), plan.length]
    keys = sum(stops)
    pairs = sum(stop * (stop - start) for start, stop in zip([0, *stops], stops, strict=False))
    width = shape.heads * shape.head_size
    c = 4 if plan.on_cpu else plan.compute_bytes
    # On a CPU the attention weights are kept, on a GPU what is added to the scores.
    queries = (1 if plan.on_cpu else 2) * c * width * plan.length
    masks = shape.heads_kv + 2
    return queries + 2 * c * width * keys + (c * shape.heads + masks) * pairs


def backward_bytes(shape: ModelShape, plan: MemoryPlan) -> float:
    """Bytes of the gradients within a layer, beside what its forward kept."""
    c, tokens = plan.compute_bytes, plan.batch * plan.length
    ffn = tokens * (2 * c * shape.ff + 4 * shape.embd)
    scores = plan.batch * shape.heads * CHUNK_QUERIES * plan.length
    return max(ffn, 2 * (4 if plan.on_cpu else c) * scores)


def _logits_bytes(shape: ModelShape, plan: MemoryPlan) -> float:
    """Bytes of the logits of student and teacher, of their gradient, and of some rows' chances."""
    tokens = plan.batch * plan.length
    copies = 3 if plan.batch == 1 else 5  # those of several sequences are put together
    rows = min(tokens, CPU_ROWS if plan.on_cpu else ROWS)
    return shape.vocab * (copies * tokens * plan.compute_bytes + LOSS_COPIES * 4 * rows)


def _evaluation_bytes(shape: ModelShape, plan: MemoryPlan) -> float:
    """Bytes of an evaluation: the logits of both models, or the layers of a long sequence."""
    c = plan.compute_bytes
    logits = shape.vocab * plan.length * (2 * c + (4 if c < 4 else 0))
    chunk = shape.heads * CHUNK_QUERIES * plan.longest * (4 + 2 * c)
    passing = plan.longest * (3 * c * shape.ff + 4 * 4 * shape.embd) + chunk
    moments = 4 * shape.embd**2 * (shape.layers if plan.on_cpu else 1)
    return max(logits, passing + moments)
