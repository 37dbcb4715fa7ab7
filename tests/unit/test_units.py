"""Kinds of units, units of a layer, and their text forms."""

import copy
import json
import pickle

import pytest

from mod_export.errors import UserError
from mod_export.units import (
    UNIT_KINDS,
    Unit,
    by_kind,
    deciding_order,
    format_layers,
    kind_of_c_value,
    parse_kinds,
    parse_layers,
    parse_shares,
    routed_layers,
    shares_by_kind,
)


def test_kinds_are_in_deciding_order():
    assert list(UNIT_KINDS) == ["kv", "block", "attn", "ffn"]
    assert [kind.order for kind in UNIT_KINDS.values()] == [0, 1, 2, 3]
    assert all(name == kind.name for name, kind in UNIT_KINDS.items())


def test_values_in_c():
    """The order of enum llama_mod_kind in llama-mod.h."""
    assert [kind_of_c_value(value) for value in range(4)] == ["block", "attn", "ffn", "kv"]


def test_a_unit_is_a_tuple():
    unit = Unit(2, "kv")
    assert unit == (2, "kv") and {(2, "kv"): 1}[unit] == 1 and json.dumps(unit) == '[2, "kv"]'


def test_order_and_groups():
    units = [Unit(1, "ffn"), Unit(0, "ffn"), Unit(1, "kv"), Unit(1, "attn")]
    ordered = sorted(units, key=deciding_order)
    assert ordered == [(0, "ffn"), (1, "kv"), (1, "attn"), (1, "ffn")]
    assert by_kind(ordered) == {
        "ffn": [(0, "ffn"), (1, "ffn")],
        "kv": [(1, "kv")],
        "attn": [(1, "attn")],
    }


def test_layers_as_ranges():
    assert format_layers({0, 1, 2, 4, 6, 7}) == "0-2, 4, 6, 7" and format_layers([]) == ""
    for layers in ([3], [0, 1], [0, 1, 2, 3], [0, 2, 4, 5, 6, 30]):
        assert parse_layers(format_layers(layers)) == layers


def test_shares():
    assert parse_shares("0.5") == 0.5
    assert parse_shares("kv=0.5, attn=0.8") == {"kv": 0.5, "attn": 0.8}
    for wrong in ("", "half", "kv=half", "kv=", "kv=0.5,kv=0.4", "kv=0.5,,"):
        with pytest.raises(UserError):
            parse_shares(wrong)
    assert shares_by_kind(0.5, ["kv", "ffn"]) == {"kv": 0.5, "ffn": 0.5}
    assert shares_by_kind({"ffn": 0.4, "kv": 0.5}, ["kv", "ffn"]) == {"kv": 0.5, "ffn": 0.4}
    with pytest.raises(UserError, match="attn, which is not routed"):
        shares_by_kind({"kv": 0.5, "attn": 0.5}, ["kv"])
    with pytest.raises(UserError, match="no target activation for ffn"):
        shares_by_kind({"kv": 0.5}, ["kv", "ffn"])


def test_layers():
    assert parse_layers("auto") is None and routed_layers(None, 5, "attn") == [2, 3, 4]
    assert routed_layers(None, 5, "kv") == [1, 2, 3, 4]
    assert parse_layers("3-5") == [3, 4, 5] and parse_layers(" 7, 2-3,3 ") == [2, 3, 7]
    assert routed_layers([1, 4], 5, "kv") == [1, 4]
    assert parse_layers("2-", 5) == [2, 3, 4] and parse_layers("0,3 -", 5) == [0, 3, 4]
    assert parse_layers("7-", 5) == [7]  # refused by routed_layers
    for wrong in ("", "3-", "-3", "a", "3..5", "1,,2", "5-3", "2-3-4", "1.5", "all"):
        with pytest.raises(UserError, match="layers"):
            parse_layers(wrong)
    for wrong in ("-3", "2--", "2 3", "-", "3-5-"):
        with pytest.raises(UserError, match="layers"):
            parse_layers(wrong, 9)
    with pytest.raises(UserError, match="there is no layer 5"):
        routed_layers([2, 5], 5, "kv")
    with pytest.raises(UserError, match="only 2 layers"):
        routed_layers(None, 2, "kv")


def test_units():
    assert parse_kinds("kv") == ["kv"] and parse_kinds("attn+ffn + kv") == ["attn", "ffn", "kv"]
    for wrong in ("", "kvs", "kv+", "kv+kv", "block+attn", "ffn+block", "kv,ffn"):
        with pytest.raises(UserError):
            parse_kinds(wrong)


def test_a_unit_of_a_head():
    unit = Unit(2, "kv", 1)
    assert unit == (2, "kv", 1) and hash(unit) == hash((2, "kv", 1))
    assert (unit.layer, unit.kind, unit.head, unit.place) == (2, "kv", 1, "head 1 of layer 2")
    assert Unit(2, "kv").head is None and Unit(2, "kv").place == "layer 2"
    assert Unit(2, "kv") != Unit(2, "kv", 0)
    units = [Unit(1, "attn"), Unit(1, "kv", 2), Unit(2, "kv", 0), Unit(1, "kv", 0)]
    assert sorted(units, key=deciding_order) == [
        (1, "kv", 0),
        (1, "kv", 2),
        (1, "attn"),
        (2, "kv", 0),
    ]


@pytest.mark.parametrize("unit", [Unit(2, "kv"), Unit(2, "kv", 1)])
def test_units_stay_units_when_they_are_copied(unit):
    copies = [pickle.loads(pickle.dumps(unit, protocol)) for protocol in range(6)]
    for made in (*copies, copy.copy(unit), copy.deepcopy(unit)):
        assert type(made) is Unit and made == unit
