"""What a Mixture-of-Depths model adds to a model's configuration: which units are routed, and how.

Knows nothing of torch or of files. In a Hugging Face directory it is the key `mod` of config.json;
the GGUF keys have the same layout (docs/reference/gguf-schema.md).

    kv = UnitConfig(threshold=(0.0, 0.0, 0.5), activation=(1.0, 1.0, 0.6))
    config = MoDConfig(units={"kv": kv})
    config.validate(n_layer=3)
    config.routed()  # [(2, "kv")]

    kv = UnitConfig(threshold=(0.0, 0.0, 0.5, 0.5), activation=(1.0, 1.0, 0.6, 0.2), heads=2)
    MoDConfig(units={"kv": kv}).routed()  # [(1, "kv", 0), (1, "kv", 1)]
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mod_export.errors import UserError
from mod_export.units import ATTN, BLOCK, FFN, KV, UNIT_KINDS, Unit, by_kind, units_in

VERSIONS = (1, 2)  # of the schema
GATING_FUNC = "sigmoid"
SINK_TOKENS = 4  # A config has this many by default.
# The default of 256 is far better than 64 at equal K/V, and 3 % of a context of 8192 tokens.
KV_WINDOW = 256
# What a decision of a kv unit is about, and the default of a conversion.
HEAD, LAYER = KV_GRANULARITIES = ("head", "layer")
KV_GRANULARITY = HEAD


@dataclass(frozen=True)
class UnitConfig:
    """One kind of unit. The tuples have n_layer * heads values, that of a unit at `index(unit)`.

    threshold: p in (0, 1), 0 where this unit is not routed
    activation: share of tokens active on calibration text, 1 where not routed
    heads: decisions for each token in a layer. With 1 a layer decides as a whole; kv units may have
        as many as the model has K/V heads.
    window: the recent tokens that each kv unit always sees, MoDConfig.kv_window where not routed.
        Empty: all have MoDConfig.kv_window.
    """

    threshold: tuple[float, ...]
    activation: tuple[float, ...]
    heads: int = 1
    window: tuple[int, ...] = ()

    @property
    def n_layer(self) -> int:
        return len(self.threshold) // self.heads

    def units(self, layer: int, kind: str) -> list[Unit]:
        """All units of a layer, routed or not: one, or one for each head."""
        return units_in(layer, kind, self.heads)

    def index(self, unit: Unit) -> int | None:
        """Where the tuples have the value of a unit of this kind; None where it is no unit here."""
        if (unit.head is None) != (self.heads == 1):
            return None
        head = unit.head or 0
        inside = 0 <= head < self.heads and 0 <= unit.layer < self.n_layer
        return unit.layer * self.heads + head if inside else None

    def with_values(
        self, threshold: Mapping[Unit, float], activation: Mapping[Unit, float]
    ) -> UnitConfig:
        """Return the same with other values of some units."""

        def changed(before: tuple[float, ...], values: Mapping[Unit, float]) -> tuple[float, ...]:
            after = {self.index(unit): value for unit, value in values.items()}
            return tuple(after.get(index, value) for index, value in enumerate(before))

        return replace(
            self,
            threshold=changed(self.threshold, threshold),
            activation=changed(self.activation, activation),
        )


@dataclass(frozen=True)
class MoDConfig:
    """All that decides what a model computes, besides its weights.

    scale_output: an active unit's output is multiplied with its score
    sink_tokens: the first positions of a sequence, which are always active
    kv_window: recent tokens that kv units always see; the largest window where units have their own
    base_is_original: the base weights are those of the original model. Then the model without its
        routers can teach; otherwise a training needs the original.
    top_k: kind -> share of a sequence's tokens that run, for a model trained with this baseline;
        empty for a model that obeys thresholds
    units: kind -> its thresholds, for each kind that is routed
    calibration: a free record of how the routers came about. No behaviour depends on it.
    """

    gating_func: str = GATING_FUNC
    scale_output: bool = False
    sink_tokens: int = SINK_TOKENS
    kv_window: int = KV_WINDOW
    base_is_original: bool = True
    top_k: dict[str, float] = field(default_factory=dict)
    units: dict[str, UnitConfig] = field(default_factory=dict)
    calibration: dict = field(default_factory=dict)

    @property
    def version(self) -> int:
        """The version of the schema: 2 where heads decide apart or have own windows, else 1."""
        kv = self.units.get(KV)
        return 2 if kv and (kv.heads > 1 or kv.window) else 1

    def routed(self) -> list[Unit]:
        """Each routed unit, in the order in which they decide: by layer, kind and head."""
        n_layer = max((units.n_layer for units in self.units.values()), default=0)
        return [
            unit
            for layer in range(n_layer)
            for kind in UNIT_KINDS
            if kind in self.units
            for unit in self.units[kind].units(layer, kind)
            if self.threshold(unit) > 0
        ]

    def by_kind(self) -> dict[str, list[Unit]]:
        """The routed units of each kind."""
        return by_kind(self.routed())

    def by_layer(self) -> dict[Unit, list[Unit]]:
        """Unit(layer, kind) -> the routed units that decide there: one, or some of the heads."""
        groups: dict[Unit, list[Unit]] = {}
        for unit in self.routed():
            groups.setdefault(Unit(unit.layer, unit.kind), []).append(unit)
        return groups

    def threshold(self, unit: Unit) -> float:
        """p of one unit, 0 where it is not routed."""
        units, index = self._find(unit)
        return 0.0 if units is None else units.threshold[index]

    def activation(self, unit: Unit) -> float:
        """Share of tokens that were active in a unit on calibration text, 1 where not routed."""
        units, index = self._find(unit)
        return 1.0 if units is None else units.activation[index]

    def window(self, unit: Unit) -> int:
        """The recent tokens that a kv unit always sees."""
        units, index = self._find(unit)
        return self.kv_window if units is None or not units.window else units.window[index]

    def heads(self, kind: str) -> int:
        """Decisions for each token in a layer with units of a kind."""
        return self.units[kind].heads if kind in self.units else 1

    def _find(self, unit: Unit) -> tuple[UnitConfig | None, int]:
        """The values of the unit's kind and their index for the unit; None where it is no unit."""
        unit = Unit(*unit)
        units = self.units.get(unit.kind)
        index = None if units is None else units.index(unit)
        return (None, 0) if index is None else (units, index)

    def validate(self, n_layer: int) -> MoDConfig:
        """Return self, or raise UserError naming the first key that breaks a rule of the schema."""
        _check_scalars(self)
        _check_top_k(self)
        for kind, unit in self.units.items():
            _check_unit(kind, unit, n_layer)
        _check_windows(self)
        _check_layers(self, n_layer)
        return self

    def to_dict(self) -> dict:
        """The JSON form; kinds are keys beside the others, only those that occur."""
        result = {name: getattr(self, name) for name in _SCALARS}
        result["base_is_original"] = self.base_is_original
        result["top_k"] = dict(self.top_k)
        for kind in UNIT_KINDS:
            if kind in self.units:
                result[kind] = _unit_to_dict(self.units[kind])
        return {**result, "calibration": dict(self.calibration)}

    @classmethod
    def from_dict(cls, data: dict) -> MoDConfig:
        """Read the JSON form.

        Raises UserError for an unknown or missing key, and for a value of the wrong type.
        """
        known = (*_SCALARS, *_FIELDS_SINCE_0_2, *UNIT_KINDS, "calibration")
        data = _checked_keys("mod", data, known=known, needed=_SCALARS)
        calibration = data.get("calibration", {})
        if not isinstance(calibration, dict):
            raise UserError("mod.calibration is not an object", "write it as {...} or leave it out")
        data = _fields_of_0_1(calibration) | data
        if not isinstance(data["top_k"], dict):
            raise UserError("mod.top_k is not an object", 'write it as {"kv": 0.5}, or {}')
        units = {kind: _unit_from_dict(kind, data[kind]) for kind in UNIT_KINDS if kind in data}
        fields_given = {name: data[name] for name in (*_SCALARS[1:], *_FIELDS_SINCE_0_2)}
        config = cls(**fields_given, units=units, calibration=calibration)
        check_version("mod.version", data["version"], config)
        return config


_SCALARS = ("version", "gating_func", "scale_output", "sink_tokens", "kv_window")
_FIELDS_SINCE_0_2 = ("base_is_original", "top_k")


def _fields_of_0_1(record: dict) -> dict:
    """The fields of a directory or adapter that mod-export 0.1 wrote, from its free record.

    The record of a training that changed the base weights has no key `model`. The record of a
    top-k training has the shares.
    """
    training = record.get("training", {})
    return {
        "base_is_original": not ("training" in record and "model" not in record),
        "top_k": training.get("top_k", {}) if isinstance(training, dict) else {},
    }


def _checked_keys(where: str, data: object, known: tuple, needed: tuple) -> dict:
    """Return data, or raise UserError where it is no object or has other keys."""
    if not isinstance(data, dict):
        raise UserError(f"{where} is not an object", "see docs/reference/config.md for its keys")
    if unknown := [str(key) for key in data if key not in known]:
        raise UserError(f"unknown key {where}.{unknown[0]}", f"known keys: {', '.join(known)}")
    if missing := [key for key in needed if key not in data]:
        raise UserError(f"missing key {where}.{missing[0]}", "convert the model again")
    return data


def check_version(key: str, value: object, config: MoDConfig) -> None:
    """Raise UserError unless `value`, which a file has at `key`, is the version of its config."""
    if not _is_int(value) or value not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise UserError(f"{key} is {value!r}, known are {known}", "use a newer mod-export")
    if value != config.version:
        what = "has" if config.version == 2 else "has not"
        raise UserError(
            f"{key} is {value}, but the model {what} kv units by head or with own windows",
            f"it must be {config.version}",
        )


def _unit_to_dict(units: UnitConfig) -> dict:
    """The JSON form of one kind; heads and window only where they are not the defaults."""
    result: dict = {"threshold": list(units.threshold), "activation": list(units.activation)}
    if units.heads != 1:
        result["heads"] = units.heads
    if units.window:
        result["window"] = list(units.window)
    return result


def _unit_from_dict(kind: str, data: object) -> UnitConfig:
    names = ("threshold", "activation")
    of_heads = ("heads", "window") if kind == KV else ()
    values = _checked_keys(f"mod.{kind}", data, known=(*names, *of_heads), needed=names)
    for name in (*names, "window"):
        if not isinstance(values.get(name, []), (list, tuple)):
            raise UserError(f"mod.{kind}.{name} is not a list", "give one number per unit")
    heads = values.get("heads", 1)
    if not _is_int(heads) or heads < 1:
        raise UserError(f"mod.{kind}.heads is {heads!r}", "use a whole number, at least 1")
    threshold, activation, window = (tuple(values.get(name, ())) for name in (*names, "window"))
    return UnitConfig(threshold, activation, heads, window)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_scalars(config: MoDConfig) -> None:
    if config.gating_func != GATING_FUNC:
        raise UserError(
            f"unknown mod.gating_func {config.gating_func!r}", f"known is {GATING_FUNC!r}"
        )
    for name in ("scale_output", "base_is_original"):
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise UserError(f"mod.{name} is {value!r}", "use true or false")
    for name, low in (("sink_tokens", 0), ("kv_window", 1)):
        value = getattr(config, name)
        if not _is_int(value) or not low <= value < 2**32:
            raise UserError(f"mod.{name} is {value!r}", f"use a whole number, at least {low}")


def _check_top_k(config: MoDConfig) -> None:
    for kind, share in config.top_k.items():
        if kind not in config.units:
            raise UserError(f"mod.top_k names {kind}, which is not routed", "leave it out")
        if not _is_share(share, below_one=False):
            raise UserError(f"mod.top_k.{kind} is {share!r}", "it must lie in [0, 1]")


def _check_unit(kind: str, units: UnitConfig, n_layer: int) -> None:
    if kind not in UNIT_KINDS:
        raise UserError(f"unknown kind of unit mod.{kind}", f"known kinds: {', '.join(UNIT_KINDS)}")
    if units.heads > 1 and kind != KV:
        raise UserError(f"mod.{kind}.heads is {units.heads}", "only kv units can be of one head")
    for name in ("threshold", "activation", *(["window"] if units.window else [])):
        values = getattr(units, name)
        if len(values) != n_layer * units.heads:
            heads = f" of {units.heads} K/V heads" if units.heads > 1 else ""
            raise UserError(
                f"mod.{kind}.{name} has {len(values)} values",
                f"the model has {n_layer} layers{heads}",
            )
    for index, unit in enumerate(
        unit for layer in range(n_layer) for unit in units.units(layer, kind)
    ):
        for name, allowed in (("threshold", "[0, 1)"), ("activation", "[0, 1]")):
            value = getattr(units, name)[index]
            if not _is_share(value, below_one=name == "threshold"):
                raise UserError(
                    f"mod.{kind}.{name} of {unit.place} is {value!r}", f"it must lie in {allowed}"
                )
    if not any(units.threshold):
        raise UserError(f"mod.{kind}.threshold routes no layer", f"leave out mod.{kind}")


def _check_windows(config: MoDConfig) -> None:
    for kind, units in config.units.items():
        if not units.window:
            continue
        if kind != KV:
            raise UserError(f"{kind} units have no window", f"leave out mod.{kind}.window")
        largest = 0
        for unit in (unit for layer in range(units.n_layer) for unit in units.units(layer, kind)):
            value, is_routed = config.window(unit), config.threshold(unit) > 0
            if not _is_int(value) or not 1 <= value < 2**32:
                raise UserError(
                    f"mod.kv.window of {unit.place} is {value!r}", "use a whole number, at least 1"
                )
            if not is_routed and value != config.kv_window:
                raise UserError(
                    f"mod.kv.window of {unit.place}, which is not routed, is {value}",
                    f"it must be mod.kv_window, {config.kv_window}",
                )
            largest = max(largest, value if is_routed else 0)
        if largest != config.kv_window:
            raise UserError(
                f"mod.kv_window is {config.kv_window}, the largest own window of a routed unit is "
                f"{largest}",
                "they must be equal",
            )


def _is_share(value: object, below_one: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    if not 0 <= value <= 1:
        return False
    # A GGUF stores 32 bits. A p very close to 1 or 0 would be 1 there, or 0, which is "not routed".
    single = struct.unpack("f", struct.pack("f", value))[0]
    return not below_one or (single < 1 and (single > 0) == (value > 0))


def _check_layers(config: MoDConfig, n_layer: int) -> None:
    kinds: list[set[str]] = [set() for _ in range(n_layer)]
    for unit in config.routed():
        kinds[unit.layer].add(unit.kind)
    for layer, here in enumerate(kinds):
        if BLOCK in here and here & {ATTN, FFN}:
            other = ATTN if ATTN in here else FFN
            raise UserError(
                f"mod.block and mod.{other} both route layer {layer}", "route one of them there"
            )
    if all(any(UNIT_KINDS[kind].frees_kv for kind in here) for here in kinds):
        raise UserError(
            "every layer has a block, attn or kv router, so no layer keeps complete K/V",
            "leave at least one layer without these (by default the first layers are not routed)",
        )
