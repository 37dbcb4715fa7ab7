"""Which units a synthetic model routes, and routers that give a chosen activation by construction.

A few leading values of the residual stream are written by the token embedding alone, so at every
depth they are c, z_1, z_2, ... of the token, divided by the RMS of the whole stream. A router with
the weights SPREAD * (-q, d_1, d_2, ...) is active where d.z >= q c, whatever that RMS is. q is a
quantile over the vocabulary of d.z / c, computed from the quantised embedding. So tokens drawn
uniformly give the activation at any depth and in any type. The directions d are orthogonal (in
groups of as many as there are z), so that units decide nearly independently of each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mod_export.config import HEAD, KV_WINDOW, SINK_TOKENS, MoDConfig, UnitConfig
from mod_export.errors import UserError
from mod_export.formats import architectures, kv_size
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.sliding_windows import main_layers
from mod_export.synthetic.weights import Weights, rng_of, table_values
from mod_export.units import (
    KV,
    Unit,
    format_layers,
    parse_kinds,
    parse_layers,
    parse_shares,
    routed_layers,
    shares_by_kind,
)

SPREAD = 2.0  # standard deviation of a router's logit where the residual stream has an RMS of 1
THRESHOLD = 0.5


@dataclass(frozen=True)
class SynthesisOptions:
    """What a synthetic model routes.

    units: kinds joined with +. activation: `0.5`, or for each kind `attn=0.3,kv=0.5`. layers:
    `auto`, `2-`, `3-5,8`. kv_granularity: what has a kv unit, each K/V head or the layer.
    """

    units: str = "kv"
    activation: str = "0.5"
    layers: str = "auto"
    sink_tokens: int = SINK_TOKENS
    kv_window: int = KV_WINDOW
    kv_granularity: str = HEAD


def routing(
    n_layer: int,
    options: SynthesisOptions,
    kv_heads: int = 1,
    possible: Callable[[str], list[int]] | None = None,
) -> MoDConfig:
    """The configuration of a model of n_layer layers.

    kv_heads: K/V heads of each layer that can decide apart

    possible: the layers that can have a unit of a kind, by default all; `auto` takes these only.

    Raises UserError for options that cannot be read, and for a configuration that the schema
    forbids.
    """
    kinds = parse_kinds(options.units)
    shares = parse_activation(options.activation, kinds)
    chosen = parse_layers(options.layers, n_layer)
    if chosen is not None and chosen[-1] >= n_layer:
        cure = f"the model has layers 0 to {n_layer - 1}; give others to --layers-routed"
        raise UserError(f"there is no layer {chosen[-1]} to route", cure)
    units_of = {}
    for kind in kinds:
        here = routed_layers(chosen, n_layer, kind)
        if chosen is None and possible:
            able = possible(kind)
            here = [layer for layer in here if layer in able]
            if not here:
                raise UserError(
                    f"by default none of the {n_layer} layers gets a {kind} unit",
                    f"use more layers, or other --units; able: {format_layers(able) or 'none'}",
                )
        n = kv_heads if kind == KV and options.kv_granularity == HEAD else 1
        every = UnitConfig((0.0,) * n_layer * n, (1.0,) * n_layer * n, heads=n)
        units = [unit for layer in here for unit in every.units(layer, kind)]
        units_of[kind] = every.with_values(
            dict.fromkeys(units, THRESHOLD), dict.fromkeys(units, shares[kind])
        )
    config = MoDConfig(sink_tokens=options.sink_tokens, kv_window=options.kv_window, units=units_of)
    return config.validate(n_layer)


def routing_of(file: GGUFFile, options: SynthesisOptions) -> MoDConfig:
    """The configuration of a model of the file's shape.

    Raises UserError as `routing` does, and for a layer that cannot have a unit of the kind.
    """
    config = routing(
        main_layers(file),
        options,
        kv_size.kv_heads(file),
        lambda kind: architectures.routable_layers(file, kind),
    )
    architectures.check_units(file, config)
    return config


def parse_activation(text: str, kinds: list[str]) -> dict[str, float]:
    """`0.5` or `attn=0.3,kv=0.5` -> share of active tokens of each kind.

    Raises UserError for any other form.
    """
    example = ",".join(f"{kind}=0.5" for kind in kinds)
    cure = f"give a number in (0, 1], or one for each kind: {example}"
    try:
        given = parse_shares(text)
    except UserError as error:
        raise UserError(f"activation {error.message}", cure) from error
    try:
        shares = shares_by_kind(given, kinds)
    except UserError as error:
        raise UserError(
            f"activation {text!r} does not fit the units {'+'.join(kinds)}", cure
        ) from error
    if not all(0 < share <= 1 for share in shares.values()):  # written so that NaN fails too
        raise UserError(f"activation {text!r} is not in (0, 1]", cure)
    return shares


def routers(config: MoDConfig, weights: Weights) -> dict[Unit, tuple[np.ndarray, np.ndarray]]:
    """Unit -> w, float32 [n_embd], and b, float32 [1], of all routed units."""
    units = config.routed()
    directions = _directions(rng_of(weights.seed, "routers"), len(units), weights.reserved - 1)
    values = table_values(weights.table, weights.embedding_type)
    result = {}
    for unit, direction in zip(units, directions, strict=True):
        w = np.zeros(weights.shape.embd, np.float32)
        w[0] = -_threshold(values[:, 1:] @ direction / values[:, 0], config.activation(unit))
        w[1 : weights.reserved] = direction
        result[unit] = SPREAD * w, np.zeros(1, np.float32)
    return result


def _directions(rng: np.random.Generator, n: int, dims: int) -> np.ndarray:
    """n random unit vectors, float32 [n, dims], orthogonal in groups of `dims`."""
    groups = [np.linalg.qr(rng.standard_normal((dims, dims)))[0] for _ in range(-(-n // dims))]
    return np.concatenate(groups)[:n].astype(np.float32)


def _threshold(values: np.ndarray, activation: float) -> float:
    """A number that a share `activation` of the values reaches.

    It lies as far as possible from the values next to it.
    """
    edges = np.sort(values)
    edges = np.concatenate([edges[:1] - 1, edges, edges[-1:] + 1])
    inactive = round((1 - activation) * len(values))
    return float((edges[inactive] + edges[inactive + 1]) / 2)
