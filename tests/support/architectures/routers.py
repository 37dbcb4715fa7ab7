"""Put random routers on a file of an architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mod_export.config import MoDConfig, UnitConfig
from mod_export.export import write_routers
from mod_export.formats.gguf import GGUFFile
from mod_export.units import ATTN, BLOCK, FFN, KV, UNIT_KINDS, Unit, deciding_order
from tests.support.architectures.models import Model

SINKS, WINDOW = 2, 6


def units_of(model: Model, kinds: tuple[str, ...]) -> list[Unit]:
    """Choose units of the kinds: attention is routed on full layers only, and one stays complete.

    Units of a single kind lie on the last two full layers, those of ffn on sliding and recurrent
    layers too.
    """
    full = model.full or tuple(range(model.n_layer))
    routable = full[1:] or full
    last, before = routable[-1], routable[-2] if len(routable) > 1 else routable[-1]
    chosen: set[Unit] = set()
    if BLOCK in kinds:
        blocks = trailing(model) or [last]
        chosen |= {Unit(layer, BLOCK) for layer in blocks}
        before = next((layer for layer in reversed(routable) if layer not in blocks), last)
    on_before = [kind for kind in (ATTN, FFN, KV) if kind in kinds]
    if before != last or BLOCK not in kinds:
        chosen |= {Unit(before, kind) for kind in on_before}
    if BLOCK not in kinds or KV in kinds:
        chosen |= {Unit(last, kind) for kind in on_before if BLOCK not in kinds or kind == KV}
    if FFN in kinds:
        chosen |= {Unit(layer, FFN) for layer in (*model.sliding[:2], *model.recurrent[:2])}
    if model.ffn_only:  # the other layers have none
        chosen = {unit for unit in chosen if unit.kind != FFN}
        chosen |= {Unit(layer, FFN) for layer in model.ffn_only[-2:] if FFN in kinds}
    return sorted(chosen, key=deciding_order)


def by_head(model: Model, units: list[Unit]) -> list[Unit]:
    """Return the units with kv units of each K/V head, where all layers have several of these."""
    heads = GGUFFile.open(model.path).keys[f"{model.architecture}.attention.head_count_kv"].value
    if not isinstance(heads, int) or heads == 1:
        return units
    return sorted(
        (
            Unit(*unit, head) if unit.kind == KV else unit
            for unit in units
            for head in range(heads if unit.kind == KV else 1)
        ),
        key=deciding_order,
    )


def trailing(model: Model) -> list[int]:
    """The last layers, two at most, that are full ones. Others do not change without them."""
    layers: list[int] = []
    for layer in reversed(range(model.n_layer)):
        if layer not in model.full[1:] or len(layers) == 2:
            break
        layers.append(layer)
    return layers


def route(
    model: Model,
    target: Path,
    units: list[Unit],
    seed: int = 0,
    biases: dict[Unit, float] | None = None,
) -> Path:
    """Write the model's file with a random router for each unit to `target`.

    biases: unit -> bias; 0 by default
    """
    rng = np.random.default_rng(seed)
    configs = {}
    for kind in UNIT_KINDS:
        own = [unit for unit in units if unit.kind == kind]
        if own:
            heads = 1 + max(unit.head or 0 for unit in own)
            none = UnitConfig((0.0,) * model.n_layer * heads, (1.0,) * model.n_layer * heads, heads)
            half = dict.fromkeys(own, 0.5)
            configs[kind] = none.with_values(half, half)
    config = MoDConfig(sink_tokens=SINKS, kv_window=WINDOW, units=configs)
    scale = np.float32(2 / np.sqrt(model.n_embd))
    routers = {
        unit: (
            scale * rng.standard_normal(model.n_embd, dtype=np.float32),
            np.array([(biases or {}).get(unit, 0.0)], np.float32),
        )
        for unit in units
    }
    write_routers(GGUFFile.open(model.path), target, config, routers)
    return target
