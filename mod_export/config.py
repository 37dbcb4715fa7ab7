"""What a Mixture-of-Depths model adds to a model's configuration: which units are routed, and how.

Knows nothing of torch or of files. In a Hugging Face directory it is the key `mod` of config.json;
the GGUF keys have the same layout (docs/reference/gguf-schema.md).

    kv = UnitConfig(threshold=(0.0, 0.0, 0.5), activation=(1.0, 1.0, 0.6))
    config = MoDConfig(units={"kv": kv})
    config.validate(n_layer=3)
    config.routed()  # [(2, "kv")]
"""

from __future__ import annotations

import math
import struct
from dataclasses import asdict, dataclass, field

from mod_export.errors import UserError
from mod_export.units import ATTN, BLOCK, FFN, UNIT_KINDS, Unit, by_kind

VERSION = 1
GATING_FUNC = "sigmoid"
SINK_TOKENS = 4  # A config has this many by default.
# The default of 256 is far better than 64 at equal K/V, and 3 % of a context of 8192 tokens.
KV_WINDOW = 256


@dataclass(frozen=True)
class UnitConfig:
    """One kind of unit. Both tuples have a value for each layer.

    threshold: p in (0, 1), 0 where this unit is not routed
    activation: share of tokens active on calibration text, 1 where not routed
    """

    threshold: tuple[float, ...]
    activation: tuple[float, ...]


@dataclass(frozen=True)
class MoDConfig:
    """All that decides what a model computes, besides its weights.

    scale_output: an active unit's output is multiplied with its score
    sink_tokens: the first positions of a sequence, which are always active
    kv_window: recent tokens that kv units always see
    base_is_original: the base weights are those of the original model. Then the model without its
        routers can teach; otherwise a training needs the original.
    top_k: kind -> share of a sequence's tokens that run, for a model trained with this baseline;
        empty for a model that obeys thresholds
    units: kind -> its thresholds, for each kind that is routed
    calibration: a free record of how the routers came about. No behaviour depends on it.
    """

    version: int = VERSION
    gating_func: str = GATING_FUNC
    scale_output: bool = False
    sink_tokens: int = SINK_TOKENS
    kv_window: int = KV_WINDOW
    base_is_original: bool = True
    top_k: dict[str, float] = field(default_factory=dict)
    units: dict[str, UnitConfig] = field(default_factory=dict)
    calibration: dict = field(default_factory=dict)

    def routed(self) -> list[Unit]:
        """Each routed unit, in the order in which they decide."""
        n_layer = max((len(unit.threshold) for unit in self.units.values()), default=0)
        return [
            Unit(layer, kind)
            for layer in range(n_layer)
            for kind in UNIT_KINDS
            if self.threshold(layer, kind) > 0
        ]

    def by_kind(self) -> dict[str, list[Unit]]:
        """The routed units of each kind."""
        return by_kind(self.routed())

    def threshold(self, layer: int, kind: str) -> float:
        """p of one unit, 0 where it is not routed."""
        unit = self.units.get(kind)
        return unit.threshold[layer] if unit and layer < len(unit.threshold) else 0.0

    def validate(self, n_layer: int) -> MoDConfig:
        """Return self, or raise UserError naming the first key that breaks a rule of the schema."""
        _check_scalars(self)
        _check_top_k(self)
        for kind, unit in self.units.items():
            _check_unit(kind, unit, n_layer)
        _check_layers(self, n_layer)
        return self

    def to_dict(self) -> dict:
        """The JSON form; kinds are keys beside the others, only those that occur."""
        result = {name: getattr(self, name) for name in _SCALARS}
        result["base_is_original"] = self.base_is_original
        result["top_k"] = dict(self.top_k)
        for kind in UNIT_KINDS:
            if kind in self.units:
                result[kind] = {key: list(value) for key, value in asdict(self.units[kind]).items()}
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
        fields_given = {name: data[name] for name in (*_SCALARS, *_FIELDS_SINCE_0_2)}
        return cls(**fields_given, units=units, calibration=calibration)


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


def _unit_from_dict(kind: str, data: object) -> UnitConfig:
    names = ("threshold", "activation")
    lists = _checked_keys(f"mod.{kind}", data, known=names, needed=names)
    for name in names:
        if not isinstance(lists[name], (list, tuple)):
            raise UserError(f"mod.{kind}.{name} is not a list", "give one number per layer")
    return UnitConfig(tuple(lists["threshold"]), tuple(lists["activation"]))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_scalars(config: MoDConfig) -> None:
    if not _is_int(config.version) or config.version != VERSION:
        raise UserError(
            f"mod.version is {config.version!r}, known is {VERSION}", "use a newer mod-export"
        )
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


def _check_unit(kind: str, unit: UnitConfig, n_layer: int) -> None:
    if kind not in UNIT_KINDS:
        raise UserError(f"unknown kind of unit mod.{kind}", f"known kinds: {', '.join(UNIT_KINDS)}")
    for name in ("threshold", "activation"):
        values = getattr(unit, name)
        if len(values) != n_layer:
            raise UserError(
                f"mod.{kind}.{name} has {len(values)} values", f"the model has {n_layer} layers"
            )
        for layer, value in enumerate(values):
            if not _is_share(value, below_one=name == "threshold"):
                allowed = "[0, 1)" if name == "threshold" else "[0, 1]"
                raise UserError(
                    f"mod.{kind}.{name} of layer {layer} is {value!r}", f"it must lie in {allowed}"
                )
    if not any(unit.threshold):
        raise UserError(f"mod.{kind}.threshold routes no layer", f"leave out mod.{kind}")


def _is_share(value: object, below_one: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    if not 0 <= value <= 1:
        return False
    # A GGUF stores 32 bits. A p very close to 1 or 0 would be 1 there, or 0, which is "not routed".
    single = struct.unpack("f", struct.pack("f", value))[0]
    return not below_one or (single < 1 and (single > 0) == (value > 0))


def _check_layers(config: MoDConfig, n_layer: int) -> None:
    kinds = [
        {kind for kind in config.units if config.threshold(layer, kind) > 0}
        for layer in range(n_layer)
    ]
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
