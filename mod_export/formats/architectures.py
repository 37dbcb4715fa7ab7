"""Which architectures of llama.cpp can have routers, of which kinds, and why others cannot.

    kinds("qwen3")            # ("block", "attn", "ffn", "kv")
    reason("mamba")           # "its layers have a recurrent state and no attention"
    reason("qwen3")           # None: it has all kinds
    check("mamba", {"kv"})    # raises UserError
    of_class("Qwen3ForCausalLM")   # "qwen3"
    of_model_type("gemma3_text")   # "gemma3"

An architecture is what a GGUF file's `general.architecture` names. `python -m
scripts.docs.architectures` runs each one in the patched llama.cpp and writes architectures.json.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.formats import kv_size
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.recurrent_layers import (
    OR_FFN,
    attention_layers,
    ffn_layers,
    recurrent_layers,
)
from mod_export.formats.sliding_windows import layer_windows, main_layers
from mod_export.units import ATTN, FFN, KV, UNIT_KINDS, format_layers

TABLE = Path(__file__).with_suffix(".json")
UNKNOWN = "this version of llama.cpp does not know it"
PAGE = "docs/reference/architectures.md"


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    kinds: kinds of units that run
    reason: why the other kinds do not, None where all do
    note: where some of its models lack kinds that others have, why
    sliding: whether its models can have layers with a sliding window
    classes: classes of transformers whose models llama.cpp's converter turns into it
    examples: repositories of models
    """

    kinds: tuple[str, ...]
    reason: str | None = None
    note: str | None = None
    sliding: bool = False
    classes: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()


@functools.cache
def table() -> dict[str, Architecture]:
    """All rows by the name of the architecture."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"), object_hook=_tuples)
    return {name: Architecture(**row) for name, row in rows.items()}


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


def kinds(architecture: str) -> tuple[str, ...]:
    """Return the kinds of units that the architecture can have; none where it is refused."""
    row = table().get(architecture)
    return row.kinds if row else ()


def reason(architecture: str) -> str | None:
    """Say why the architecture lacks kinds of units, or return None where it has all of them."""
    row = table().get(architecture)
    return row.reason if row else UNKNOWN


def check(architecture: str, wanted: Collection[str]) -> None:
    """Raise UserError where the architecture lacks one of the wanted kinds of units."""
    possible = kinds(architecture)
    lacking = [kind for kind in UNIT_KINDS if kind in wanted and kind not in possible]
    if not lacking:
        return
    if not possible:
        raise UserError(
            f"models of architecture '{architecture}' cannot have routers: {reason(architecture)}",
            f"choose a model of another architecture, {PAGE} lists them",
        )
    raise UserError(
        f"models of architecture '{architecture}' cannot have units of kind {', '.join(lacking)}: "
        f"{reason(architecture)}",
        f"use {' or '.join(possible)} units",
    )


def routable_layers(file: GGUFFile, kind: str) -> list[int]:
    """Return the layers of a file that can have a unit of the kind.

    `ffn` units can be wherever there is an FFN. The other kinds decide what is remembered, so they
    need a layer with full attention whose K and V no other layer reads, and no recurrent state,
    which needs all tokens.
    """
    refused = _refused_layers(file, kind)
    return [layer for layer in range(main_layers(file)) if not refused[layer]]


def check_units(file: GGUFFile, config: MoDConfig, name: str = "") -> None:
    """Raise UserError where a unit stands in an architecture or layer that cannot have it.

    name: what the message calls the file, by default its path.
    """
    check(file.architecture, config.units)
    refused = {kind: _refused_layers(file, kind) for kind in config.units}
    for unit in config.routed():
        if why := refused[unit.kind][unit.layer]:
            possible = format_layers(routable_layers(file, unit.kind)) or "it has none"
            is_ffn = unit.kind == FFN
            raise UserError(
                f"layer {unit.layer} of {name or file.path} cannot have a {unit.kind} unit: {why}",
                f"route layers with {'an FFN' if is_ffn else 'full attention'} ({possible})"
                f"{'' if is_ffn else ', or ffn units'}",
            )


def _refused_layers(file: GGUFFile, kind: str) -> list[str | None]:
    """Why each layer cannot have a unit of the kind, [n_layer]; None where it can."""
    n_layer = file.model_number("block_count")
    if kind == FFN:
        return [None if has else "it has no FFN" for has in ffn_layers(file)]
    windows, recurrent = layer_windows(file), recurrent_layers(file)
    attends = attention_layers(file)
    alone = kind == ATTN and file.architecture in OR_FFN
    return [
        _state(kind, recurrent[layer], attends[layer])
        or ("its attention is all that it has, which a block unit skips" if alone else None)
        or _keeps(file, windows, layer)
        for layer in range(n_layer)
    ]


def _state(kind: str, recurrent: bool, attends: bool) -> str | None:
    """Why a layer with a recurrent state, or without attention, cannot have a unit of the kind."""
    if not attends:
        return "it has a recurrent state" if recurrent else "it has no attention"
    if recurrent and kind != KV:
        return "it has a recurrent state beside its attention"
    return None


def _keeps(file: GGUFFile, windows: tuple[int, ...], layer: int) -> str | None:
    """Why nothing of what a layer remembers can be left out; None where it can."""
    own, n_main = kv_size.own_kv_layers(file), main_layers(file)
    if windows[layer]:
        return f"it attends to a sliding window of {windows[layer]} tokens"
    if layer >= n_main:
        return "it predicts tokens further on, and is no part of an ordinary context"
    if layer >= own:
        return "it reads the K and V of an earlier layer"
    if layer == own - 1 and own < n_main and not all(windows[own:n_main]):
        return "later layers read its K and V"
    return None


def of_class(name: str) -> str | None:
    """Return the architecture of a class of transformers, such as Qwen3ForCausalLM.

    None for a class that llama.cpp's converter does not know.
    """
    return next((arch for arch, row in table().items() if name in row.classes), None)


def of_model_type(model_type: str) -> str | None:
    """Return the architecture of a `model_type` of transformers, such as gemma3_text.

    A class of transformers has the name of its model's type: Gemma3ForCausalLM. The name of an
    architecture stands for itself. None for a model that llama.cpp's converter does not know.
    """
    wanted = _plain(model_type.removesuffix("_text"))
    for architecture, row in table().items():
        if wanted in (_plain(name.partition("For")[0]) for name in row.classes):
            return architecture
    return model_type if model_type in table() else None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
