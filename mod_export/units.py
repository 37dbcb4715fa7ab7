"""Routed units: the kinds, a unit of one layer or head, and the text forms of the command line.

The records in UNIT_KINDS are the only place that says what a kind is. Everything else refers to a
kind by its name: KV, BLOCK, ATTN or FFN.

    Unit(2, KV)                          # the kv unit of layer 2; equal to (2, "kv")
    Unit(2, KV, 1)                       # the kv unit of K/V head 1 in layer 2
    UNIT_KINDS[KV].saves                 # "KV memory, ..."
    parse_kinds("kv+attn")               # ["kv", "attn"]
    parse_layers("3-5,8")                # [3, 4, 5, 8]
    parse_shares("kv=0.5,attn=0.8")      # {"kv": 0.5, "attn": 0.8}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mod_export.errors import UserError

KV = "kv"
BLOCK = "block"
ATTN = "attn"
FFN = "ffn"


@dataclass(frozen=True)
class UnitKind:
    """What a token may skip in a decoder layer; docs/explanation/semantics.md has the definitions.

    order: place in the order in which the units of a layer decide
    c_value: value of this kind in enum llama_mod_kind of llama-mod.h
    first_layer: the first layer that is routed by default. Earlier layers decide with too little
        context, and one layer must have complete K/V.
    saves: what skipping saves
    active: what an active token does
    frees_kv: whether the cache loses K/V of inactive tokens
    skips_compute: whether the unit does not run for inactive tokens
    colour: of plots. The colours have equal weight to the eye and are distinct without colour
        vision (Okabe and Ito).
    """

    name: str
    order: int
    c_value: int
    first_layer: int
    saves: str
    active: str
    frees_kv: bool
    skips_compute: bool
    colour: str


_KINDS = (
    UnitKind(
        name=KV,
        order=0,
        c_value=3,
        first_layer=1,
        saves="KV memory, and attention time at long context",
        active="remembered beyond the window",
        frees_kv=True,
        skips_compute=False,
        colour="#0072B2",
    ),
    UnitKind(
        name=BLOCK,
        order=1,
        c_value=0,
        first_layer=2,
        saves="all compute and K/V of the layer",
        active="layer runs",
        frees_kv=True,
        skips_compute=True,
        colour="#6A3D9A",
    ),
    UnitKind(
        name=ATTN,
        order=2,
        c_value=1,
        first_layer=2,
        saves="attention compute and its K/V",
        active="attention runs",
        frees_kv=True,
        skips_compute=True,
        colour="#D55E00",
    ),
    UnitKind(
        name=FFN,
        order=3,
        c_value=2,
        first_layer=2,
        saves="FFN compute",
        active="FFN runs",
        frees_kv=False,
        skips_compute=True,
        colour="#009E73",
    ),
)
# name -> record, in the order in which the units of a layer decide
UNIT_KINDS: dict[str, UnitKind] = {kind.name: kind for kind in _KINDS}


class Unit(tuple):
    """One decision for each token: a unit of one layer, or the kv unit of one K/V head of a layer.

    A unit is a tuple, (layer, kind) or (layer, kind, head), and equal to a plain tuple of the same
    elements.

    layer: number of the layer
    kind: name of a kind
    head: number of the K/V head; None where the unit is not of one head
    """

    __slots__ = ()

    def __new__(cls, layer: int, kind: str, head: int | None = None) -> Unit:
        return super().__new__(cls, (layer, kind) if head is None else (layer, kind, head))

    def __getnewargs__(self) -> tuple:
        return tuple(self)

    def __repr__(self) -> str:
        return f"Unit{tuple(self)!r}"

    @property
    def layer(self) -> int:
        return self[0]

    @property
    def kind(self) -> str:
        return self[1]

    @property
    def head(self) -> int | None:
        return self[2] if len(self) == 3 else None

    def to_dict(self) -> dict:
        """The JSON form: layer and kind, and head where the unit is of one."""
        return dict(zip(("layer", "kind", "head"), self, strict=False))

    @property
    def place(self) -> str:
        """Where the unit stands, for messages: `layer 2`, or `head 1 of layer 2`."""
        layer = f"layer {self.layer}"
        return layer if self.head is None else f"head {self.head} of {layer}"


def units_in(layer: int, kind: str, heads: int) -> list[Unit]:
    """The units of a kind in a layer: one, or one for each of several heads."""
    return [Unit(layer, kind, head if heads > 1 else None) for head in range(heads)]


def units_of(records: Iterable) -> list[Unit]:
    """The units of records that have `layer`, `kind` and `head`."""
    return [Unit(record.layer, record.kind, record.head) for record in records]


def kind_of_c_value(value: int) -> str:
    """The name of the kind with this value in enum llama_mod_kind."""
    return next(kind.name for kind in _KINDS if kind.c_value == value)


def deciding_order(unit: Unit) -> tuple[int, int, int]:
    """A key to sort units by: the order in which the units of a model decide."""
    return unit.layer, UNIT_KINDS[unit.kind].order, unit.head or 0


def by_kind(units: Iterable[Unit]) -> dict[str, list[Unit]]:
    """The units of each kind, both in the order given."""
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.kind, []).append(unit)
    return groups


def shares_by_kind(share: float | Mapping[str, float], kinds: Iterable[str]) -> dict[str, float]:
    """Return the share of each kind.

    `share` is one number for all kinds, or a mapping that names just these kinds.

    Raises UserError for a kind too many or too few.
    """
    if not isinstance(share, Mapping):
        return dict.fromkeys(kinds, share)
    kinds = list(kinds)
    if unknown := sorted(set(share) - set(kinds)):
        raise UserError(
            f"target activation for {unknown[0]}, which is not routed", f"name {', '.join(kinds)}"
        )
    if missing := [kind for kind in kinds if kind not in share]:
        raise UserError(f"no target activation for {missing[0]}", f"write {missing[0]}=0.5 too")
    return {kind: share[kind] for kind in kinds}


def parse_kinds(text: str) -> list[str]:
    """`kv+ffn` -> ["kv", "ffn"].

    Raises UserError for an unknown or repeated kind, and for block beside attn or ffn.
    """
    kinds = [kind.strip() for kind in text.split("+")]
    for kind in kinds:
        if kind not in UNIT_KINDS:
            raise UserError(
                f"unknown kind of unit {kind!r}", f"use {', '.join(UNIT_KINDS)}, combined with +"
            )
        if kinds.count(kind) > 1:
            raise UserError(f"{kind} is named twice in {text!r}", "name each kind once")
    if BLOCK in kinds and {ATTN, FFN} & set(kinds):
        raise UserError(
            f"{text!r}: a block holds attention and FFN already", "use block, or attn and ffn"
        )
    return kinds


def parse_layers(text: str, n_layer: int | None = None) -> list[int] | None:
    """`auto` -> None, `3-5,8` -> [3, 4, 5, 8]; with n_layer = 5 also `2-` -> [2, 3, 4].

    Raises UserError for any other form. Whether the model has the layers is not checked here:
    routed_layers does that.
    """
    if text.strip() == "auto":
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})\s*(-)?\s*(\d{1,5})?\s*", part)
        is_open = match is not None and match[2] and not match[3]
        if match is None or (match[3] and not match[2]) or (is_open and n_layer is None):
            raise UserError(
                f"cannot read layers {text!r}", "write 'auto', or ranges such as 3-28 or 2,4,8-11"
            )
        first = int(match[1])
        last = int(match[3] or first)
        if is_open and n_layer is not None:
            last = max(first, n_layer - 1)
        if last < first:
            raise UserError(f"layers {part.strip()!r} run backwards", f"write {last}-{first}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def format_layers(layers: Iterable[int]) -> str:
    """[0, 1, 2, 4, 5] -> `0-2, 4, 5`, which parse_layers reads; in ascending order."""
    rows: list[list[int]] = []
    for layer in sorted(layers):
        if rows and rows[-1][-1] == layer - 1:
            rows[-1].append(layer)
        else:
            rows.append([layer])
    parts = [f"{row[0]}-{row[-1]}" if len(row) > 2 else ", ".join(map(str, row)) for row in rows]
    return ", ".join(parts)


def routed_layers(chosen: list[int] | None, n_layer: int, kind: str) -> list[int]:
    """The layers to route units of a kind in. `chosen` is what parse_layers returned.

    Raises UserError for a layer that the model does not have, and for a model with too few layers.
    """
    if chosen is None:
        if n_layer <= max(record.first_layer for record in _KINDS):
            raise UserError(
                f"the model has only {n_layer} layers",
                f"name the layers to route, such as --layers-routed {n_layer - 1}-",
            )
        return list(range(UNIT_KINDS[kind].first_layer, n_layer))
    if chosen[-1] >= n_layer:
        raise UserError(
            f"there is no layer {chosen[-1]}", f"the model has layers 0 to {n_layer - 1}"
        )
    return chosen


def parse_shares(text: str) -> float | dict[str, float]:
    """`0.5` -> 0.5, `kv=0.5,attn=0.8` -> {"kv": 0.5, "attn": 0.8}.

    The kinds are not checked here: shares_by_kind does that. Raises UserError for any other form.
    """
    pairs = []
    try:
        if "=" not in text:
            return float(text)
        for part in text.split(","):
            kind, _, share = part.partition("=")
            pairs.append((kind.strip(), float(share)))
    except ValueError:
        raise UserError(
            f"{text!r} is neither a number nor kinds such as kv=0.5,attn=0.8",
            "write 0.5 for all kinds",
        ) from None
    shares = dict(pairs)
    if len(shares) < len(pairs):
        raise UserError(f"{text!r} names a kind twice", "name each kind once")
    return shares
