"""What a row of a plan should take on a card, so that a measured time can be judged at once.

    predict(row, "NVIDIA H100")        # {"ms": ..., "prefill_tokens_per_s": ..., "fits": ...}
    python scripts/gpu/expect.py       # the table of docs/results/gpu.md

A decoded token takes its bytes over the card's bandwidth or its operations over the rate, whichever
is longer, and the time of its launches and waits. counts.json has these, counted by count.py. The
shares of bandwidth and rates that are reached, and the times of a launch and a wait, are
assumptions: what a measured row differs by says which of them is wrong.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from plans import KINDS, PLANS, Lane, Plan

from mod_export.common.tables import format_table
from mod_export.formats.ggml_types import type_named
from mod_export.synthetic.shape import preset_named
from mod_export.synthetic.tensors import weights

BANDWIDTH_SHARE, MATRIX_SHARE, ATTENTION_SHARE = 0.75, 0.35, 0.4
LAUNCH_US, WAIT_US = 2.0, 15.0
DENSE_LAYERS = 2  # see plans.ROUTED
KEPT_CELLS = 260  # sinks and the window of kv units
ACTIVATION = {"none": 0.5, "active": 1.0, "inactive": 0.0}
COUNTS = json.loads((Path(__file__).parent / "counts.json").read_text())


@dataclass(frozen=True)
class Card:
    """gb_s, gb: of its memory. int8, f16: tera-operations/s of its matrix units."""

    name: str
    gb_s: float
    int8: float
    f16: float
    gb: float


# from NVIDIA's data sheets; f16 with sums in f32
CARDS = (
    Card("H100", 3350, 1979, 989, 80),
    Card("H200", 4800, 1979, 989, 141),
    Card("RTX 4090", 1008, 660, 165, 24),
    Card("RTX 3090", 936, 284, 71, 24),
    Card("RTX 4060", 272, 121, 30, 8),
)


def card_named(gpu: str) -> Card | None:
    """The card in the driver's name of a GPU, such as `NVIDIA H100 80GB HBM3`."""
    return next((card for card in CARDS if card.name in gpu), None)


@dataclass(frozen=True)
class Work:
    """Bytes read and operations of one step, or of one token of a prompt."""

    bytes: float
    matrix: float
    attention: float


def step(lane: Lane, plan: Plan, force: str, context: int, output: bool = True) -> Work:
    """One decoded token of every sequence. output: whether logits are wanted."""
    share = ACTIVATION[force] if lane.model in KINDS else 1.0
    some = 1 - (1 - share) ** plan.batch  # that at least one sequence runs a unit
    shape, layers = preset_named(plan.shape), routed_layers(lane, plan)
    read = matrix = 0.0
    for weight in weights(shape, type_named("q4_0")):
        table = weight.name in ("token_embd.weight", "output.weight")
        if table and not (output and (shape.tied or weight.name == "output.weight")):
            continue
        runs, any_runs = (share, some) if skipped(lane, weight.name) else (1.0, 1.0)
        if lane.model == "pruned" and layer_of(weight.name) >= DENSE_LAYERS:
            continue
        read += any_runs * weight.nbytes
        matrix += runs * 2 * weight.rows * weight.cols
    cells = DENSE_LAYERS * context + layers * cells_of(lane, share, context)
    read += plan.batch * cells * 2 * 2 * shape.embd_kv
    return Work(read, plan.batch * matrix, plan.batch * cells * 4 * shape.embd)


def routed_layers(lane: Lane, plan: Plan) -> int:
    return 0 if lane.model == "pruned" else preset_named(plan.shape).layers - DENSE_LAYERS


def layer_of(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def skipped(lane: Lane, name: str) -> bool:
    """Whether an inactive token skips this weight."""
    part = ".attn" if lane.model == "attn" else "."
    return lane.model in ("attn", "block") and layer_of(name) >= DENSE_LAYERS and part in name


def cells_of(lane: Lane, share: float, context: int) -> float:
    """K/V cells of a routed layer that a token attends to, on average."""
    if lane.model == "kv":
        return share * context + (1 - share) * min(KEPT_CELLS, context)
    if lane.model in ("attn", "block"):
        return share * share * context  # of the tokens that attend, to the tokens that did
    return context


def counts_of(lane: Lane, plan: Plan, force: str) -> tuple[float, float]:
    """Launches and waits of a step."""
    if lane.model == "pruned":
        whole = COUNTS[f"{plan.shape} dense segments none"]
        return whole["launches"] * DENSE_LAYERS / preset_named(plan.shape).layers, 1.0
    if lane.way == "graph":
        outside = COUNTS[f"{plan.shape} {lane.model} segments inactive"]["launches"]
        inside = COUNTS[f"{plan.shape} {lane.model} graph active"]["launches"] - outside
        return outside + ACTIVATION[force] * inside, 2.0
    found = COUNTS[f"{plan.shape} {lane.model} segments {force}"]
    return found["launches"], found["waits"]


def seconds(work: Work, card: Card) -> float:
    matrix = work.matrix / (MATRIX_SHARE * card.int8 * 1e12)
    attention = work.attention / (ATTENTION_SHARE * card.f16 * 1e12)
    return max(work.bytes / (BANDWIDTH_SHARE * card.gb_s * 1e9), matrix + attention)


def predict(lane: Lane, plan: Plan, force: str, context: int, ubatch: int, card: Card) -> dict:
    """Milliseconds of a step and tokens/s of a prompt; whether model and K/V fit the card."""
    launches, waits = counts_of(lane, plan, force)
    work = step(lane, plan, force, context)
    overhead = 1e-6 * (LAUNCH_US * launches + WAIT_US * waits)
    # a token of a prompt attends to half of it on average, and only the last one has logits
    one = step(lane, Plan(0, plan.shape, (), ()), force, context // 2, output=False)
    chunk = Work(one.bytes, one.matrix * ubatch, one.attention * ubatch)
    return {
        "ms": 1e3 * (seconds(work, card) + overhead),
        "prefill_tokens_per_s": ubatch / (seconds(chunk, card) + overhead),
        "fits": work.bytes < 0.9e9 * card.gb,
        "bytes": work.bytes,
        "operations": work.matrix + work.attention,
        "launches": launches,
        "waits": waits,
    }


def table() -> str:
    """Every row of every plan: what it should take on each card."""
    rows = []
    for name, plan in PLANS.items():
        for force in plan.forces:
            for lane in plan.lanes:
                if force in lane.forces(plan.forces):
                    rows += [
                        [
                            name,
                            lane.name,
                            FORCE_WORDS[force],
                            context,
                            *cells(lane, plan, force, context),
                        ]
                        for context in plan.contexts
                    ]
    head = ["part", "model", "units", "tokens", "GB", "launches", "waits"]
    return format_table([*head, *(card.name for card in CARDS), "measured"], rows, markdown=True)


FORCE_WORDS = {"none": "half", "active": "all", "inactive": "none"}


def cells(lane: Lane, plan: Plan, force: str, context: int) -> list:
    """A row's figures; of `prefill` tokens/s at the largest ubatch, else ms of a step."""
    key = "prefill_tokens_per_s" if plan is PLANS["prefill"] else "ms"
    found = [predict(lane, plan, force, context, plan.ubatches[-1], card) for card in CARDS]
    figures = [f"{p[key]:.{0 if p[key] > 100 else 1}f}" if p["fits"] else "no room" for p in found]
    first = found[0]
    counted = [f"{first['launches']:.0f}", f"{first['waits']:.0f}"]
    return [f"{first['bytes'] / 1e9:.1f}", *counted, *figures, "not measured yet"]


if __name__ == "__main__":
    print(table())
