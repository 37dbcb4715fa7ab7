"""The configuration: order of units, JSON round trip, and one clear error for each rule of the
schema.
"""

import json
import math

import pytest

from mod_export.config import MoDConfig, UnitConfig
from mod_export.errors import UserError
from mod_export.units import Unit

GOOD = {
    "version": 1,
    "gating_func": "sigmoid",
    "scale_output": False,
    "sink_tokens": 4,
    "kv_window": 64,
    "attn": {"threshold": [0.0, 0.5, 0.25], "activation": [1.0, 0.5, 0.75]},
    "kv": {"threshold": [0.0, 0.5, 0.0], "activation": [1.0, 0.3, 1.0]},
    "ffn": {"threshold": [0.9, 0.5, 0.0], "activation": [0.1, 0.3, 1.0]},
    "calibration": {"text": "some", "tokens": 1000},
}


def with_(**changes):
    return {**json.loads(json.dumps(GOOD)), **changes}


def unit(*threshold, activation=(1.0, 0.5, 0.5)):
    return {"threshold": list(threshold), "activation": list(activation)}


def test_routed_units_are_in_deciding_order():
    config = MoDConfig.from_dict(GOOD).validate(3)
    assert config.routed() == [(0, "ffn"), (1, "kv"), (1, "attn"), (1, "ffn"), (2, "attn")]
    assert config.threshold((2, "attn")) == 0.25
    assert config.threshold((0, "block")) == 0


def test_block_decides_after_kv():
    config = MoDConfig(
        units={kind: UnitConfig((0.0, 0.5), (1.0, 0.5)) for kind in ("block", "kv")}
    ).validate(2)
    assert config.routed() == [(1, "kv"), (1, "block")]


def test_json_round_trip():
    text = json.dumps(MoDConfig.from_dict(GOOD).to_dict())
    assert json.loads(text) == GOOD | {"base_is_original": True, "top_k": {}}
    assert MoDConfig.from_dict(json.loads(text)) == MoDConfig.from_dict(GOOD)


def test_fields_of_version_0_1_come_from_its_record():
    """Version 0.1 had no fields for them; newer files have, and their record decides nothing."""
    training = {"top_k": {"attn": 0.5}}

    def read(**changes):
        return MoDConfig.from_dict(with_(**changes)).validate(3)

    assert read().base_is_original and read().top_k == {}
    assert read(calibration={"training": training, "model": "m"}).base_is_original
    old = read(calibration={"training": training})
    assert not old.base_is_original and old.top_k == {"attn": 0.5}
    new = read(calibration={"training": training}, base_is_original=True, top_k={})
    assert new.base_is_original and new.top_k == {}
    assert MoDConfig.from_dict(old.to_dict()) == old


def test_a_config_without_units_is_a_dense_model():
    config = MoDConfig().validate(4)
    assert config.routed() == []
    assert MoDConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "data, named",
    [
        (with_(thresholds=1), "mod.thresholds"),
        (with_(attn={**unit(0, 0.5, 0), "p": 1}), "mod.attn.p"),
        (with_(attn={"threshold": [0, 0.5, 0]}), "mod.attn.activation"),
        (with_(attn={"threshold": 0.5, "activation": [1, 1, 1]}), "mod.attn.threshold"),
        (with_(attn=[0.5]), "mod.attn"),
        (with_(calibration="text"), "mod.calibration"),
        (with_(top_k=0.5), "mod.top_k"),
        ({k: v for k, v in GOOD.items() if k != "kv_window"}, "mod.kv_window"),
        (None, "mod"),
    ],
)
def test_malformed_json_is_named(data, named):
    with pytest.raises(UserError) as error:
        MoDConfig.from_dict(data)
    assert f"{named} " in f"{error.value} ".replace(";", " ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"version": 2}, "mod.version"),
        ({"version": True}, "mod.version"),
        ({"gating_func": "softmax"}, "mod.gating_func"),
        ({"scale_output": 1}, "mod.scale_output"),
        ({"base_is_original": "yes"}, "mod.base_is_original"),
        ({"top_k": {"block": 0.5}}, "mod.top_k names block"),
        ({"top_k": {"attn": 1.5}}, "mod.top_k.attn"),
        ({"sink_tokens": -1}, "mod.sink_tokens"),
        ({"sink_tokens": 1.5}, "mod.sink_tokens"),
        ({"kv_window": 0}, "mod.kv_window"),
        ({"attn": unit(0, 1, 0)}, "mod.attn.threshold of layer 1"),
        ({"attn": unit(0, 1.0, 0)}, "mod.attn.threshold of layer 1"),
        ({"attn": unit(0, 0.5, -0.5)}, "mod.attn.threshold of layer 2"),
        ({"attn": unit(0, math.nan, 0)}, "mod.attn.threshold of layer 1"),
        ({"attn": unit(0, math.inf, 0)}, "mod.attn.threshold of layer 1"),
        ({"attn": unit(0, "0.5", 0)}, "mod.attn.threshold of layer 1"),
        ({"attn": unit(0, 1 - 1e-12, 0)}, "mod.attn.threshold of layer 1"),  # 1 in float32
        ({"attn": unit(0, 1e-60, 0)}, "mod.attn.threshold of layer 1"),  # 0 in float32
        ({"attn": unit(0, 0.5)}, "mod.attn.threshold"),
        ({"attn": unit(0, 0.5, 0, activation=(1, 2, 1))}, "mod.attn.activation of layer 1"),
        ({"attn": unit(0, 0, 0)}, "mod.attn.threshold"),
        ({"block": unit(0, 0.5, 0)}, "mod.block and mod.attn"),
        ({"block": unit(0.5, 0, 0)}, "mod.block and mod.ffn"),
        ({"kv": unit(0.5, 0.5, 0)}, "no layer keeps complete K/V"),
    ],
)
def test_each_rule_has_its_error(changes, named):
    with pytest.raises(UserError) as error:
        MoDConfig.from_dict(with_(**changes)).validate(3)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_kind_of_unit():
    with pytest.raises(UserError, match="mod.head"):
        MoDConfig(units={"head": UnitConfig((0.5,), (1.0,))}).validate(1)


HEADS = {
    "threshold": [0.0, 0.0, 0.5, 0.0, 0.5, 0.5],
    "activation": [1.0, 1.0, 0.3, 1.0, 0.2, 0.4],
    "heads": 2,
    "window": [64, 64, 16, 64, 64, 8],
}


def test_units_by_head():
    data = with_(version=2, kv=HEADS)
    config = MoDConfig.from_dict(data).validate(3)
    units = [unit for unit in config.routed() if unit.kind == "kv"]
    assert units == [(1, "kv", 0), (2, "kv", 0), (2, "kv", 1)]
    assert [config.threshold(unit) for unit in units] == [0.5, 0.5, 0.5]
    assert [config.activation(unit) for unit in units] == [0.3, 0.2, 0.4]
    assert [config.window(unit) for unit in units] == [16, 64, 8]
    assert config.threshold((1, "kv", 1)) == 0.0 and config.activation((1, "kv", 1)) == 1.0
    assert config.threshold((2, "kv")) == 0.0  # no unit of this model
    assert config.by_layer()[2, "kv"] == [(2, "kv", 0), (2, "kv", 1)]
    assert config.to_dict() == data | {"base_is_original": True, "top_k": {}}


def test_version_follows_from_the_units():
    assert MoDConfig.from_dict(GOOD).version == 1
    plain = {"threshold": (0.0, 0.5), "activation": (1.0, 0.5)}
    for units, version in {
        UnitConfig(**plain): 1,
        UnitConfig(**plain, window=(64, 8)): 2,
        UnitConfig((0.0, 0.0, 0.5, 0.5), (1.0,) * 4, heads=2): 2,
    }.items():
        assert MoDConfig(units={"kv": units}).version == version


def test_values_of_some_units_change():
    units = UnitConfig((0.0, 0.0, 0.5, 0.5), (1.0, 1.0, 0.3, 0.2), heads=2)
    changed = units.with_values({Unit(1, "kv", 1): 0.7}, {Unit(1, "kv", 0): 0.4})
    assert changed == UnitConfig((0.0, 0.0, 0.5, 0.7), (1.0, 1.0, 0.4, 0.2), heads=2)


@pytest.mark.parametrize(
    "data, named",
    [
        (with_(kv=HEADS), "mod.version is 1"),
        (with_(version=2), "mod.version is 2"),
        (with_(version=3), "mod.version is 3"),
        (with_(version=2, kv=HEADS | {"heads": 0}), "mod.kv.heads"),
        (with_(version=2, kv=HEADS | {"heads": 3}), "mod.kv.threshold has 6 values"),
        (with_(version=2, kv=HEADS | {"window": 8}), "mod.kv.window"),
        (with_(version=2, kv=HEADS | {"window": [64] * 5}), "mod.kv.window has 5 values"),
        (with_(version=2, kv=HEADS | {"window": [64] * 5 + [0]}), "head 1 of layer 2 is 0"),
        (with_(version=2, kv=HEADS | {"window": [64] * 5 + [1.5]}), "head 1 of layer 2 is 1.5"),
        (with_(version=2, kv=HEADS | {"window": [16] * 6}), "head 0 of layer 0, which"),
        (with_(version=2, kv_window=32, kv=HEADS | {"window": [32] * 5 + [64]}), "mod.kv_window"),
        (with_(attn=unit(0, 0.5, 0) | {"heads": 1}), "unknown key mod.attn.heads"),
        (
            with_(
                version=2,
                kv={"threshold": [0.5, 0, 0, 0.5, 0.5, 0], "activation": [0.5] * 6, "heads": 2},
            ),
            "no layer keeps complete K/V",
        ),
    ],
)
def test_rules_of_units_by_head(data, named):
    with pytest.raises(UserError) as error:
        MoDConfig.from_dict(data).validate(3)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_only_kv_units_are_of_one_head():
    units = UnitConfig((0.0, 0.0, 0.5, 0.5), (1.0,) * 4, heads=2)
    with pytest.raises(UserError, match="mod.attn.heads"):
        MoDConfig(units={"attn": units}).validate(2)
