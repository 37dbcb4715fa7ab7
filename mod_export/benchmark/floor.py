"""A dense GGUF without some of its layers: the floor of what skipping these layers can save.

    prune(GGUFFile.open("dense.gguf"), "floor.gguf", layers={3, 4, 5})

The remaining layers are numbered anew. Tensors are copied as bytes, so any quantisation works and
memory does not grow with the file. The result is the model with these blocks left out, which is no
useful language model.
"""

from collections.abc import Set
from pathlib import Path

import numpy as np

from mod_export.common.files import atomic_file
from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.units import BLOCK


def block_floor(mod: GGUFFile) -> set[int] | None:
    """Layers that do nothing when no unit of `mod` runs.

    None where units are routed that are not whole layers.
    """
    from mod_export.formats import schema

    config = schema.from_keys(mod)
    if config is None:
        return None
    routed = {kind: {unit.layer for unit in units} for kind, units in config.by_kind().items()}
    blocks = routed.get(BLOCK, set())
    return blocks if blocks and all(layers <= blocks for layers in routed.values()) else None


def prefill_work(floor: GGUFFile) -> float:
    """Share of its layers' matrices that a dense file applies to a prompt's token without logits.

    For such tokens llama.cpp leaves out the last layer's FFN. In a MoD model that layer may not be
    the last one, and routers read its result.
    """
    sizes = {
        name: t.nbytes
        for name, t in floor.tensors.items()
        if name.startswith("blk.") and len(t.shape) > 1
    }
    last = max(int(name.split(".")[1]) for name in sizes)
    return 1 - sum(n for name, n in sizes.items() if name.startswith(f"blk.{last}.ffn_")) / sum(
        sizes.values()
    )


def prune(source: GGUFFile, target: str | Path, layers: Set[int], force: bool = False) -> None:
    """Write `source` without `layers`.

    Raises UserError where the target exists, or the file has no such layer.
    """
    count = source.get(f"{source.architecture}.block_count", 0)
    if missing := sorted(layer for layer in layers if not 0 <= layer < count):
        raise UserError(
            f"{source.path} has {count} layers, no layer {missing[0]}",
            "give the dense file of the same model",
        )
    rest = [layer for layer in range(count) if layer not in layers]
    with atomic_file(target, force) as tmp, tmp.open("wb") as file:
        rewrite(
            source,
            file,
            changed_keys=_keys_of_layers(source, count, rest),
            kept_tensors=_tensors_of_layers(source, rest),
        )


def _keys_of_layers(source: GGUFFile, count: int, rest: list[int]) -> dict[str, object]:
    """The keys that change: the number of layers, and arrays with a value for each layer."""
    start = f"{source.architecture}."
    changed: dict[str, object] = {f"{start}block_count": len(rest)}
    for name, key in source.keys.items():
        is_array = name.startswith(start) and isinstance(key.value, np.ndarray)
        if is_array and len(key.value) == count:
            changed[name] = key.value[rest]
    return changed


def _tensors_of_layers(source: GGUFFile, rest: list[int]) -> dict[str, str]:
    """Name -> new name of the tensors that belong to a layer of `rest` or to no layer."""
    names = {}
    for name in source.tensors:
        parts = name.split(".")
        if parts[0] != "blk":
            names[name] = name
        elif int(parts[1]) in rest:
            names[name] = ".".join(["blk", str(rest.index(int(parts[1]))), *parts[2:]])
    return names
