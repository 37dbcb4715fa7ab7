"""Numbers and results as text."""

import json
from pathlib import Path

import pytest

from mod_export.common.text import (
    clock,
    json_text,
    mebibytes,
    megabytes,
    result_as_json,
    short_bytes,
)


def test_sizes_and_times():
    assert megabytes(12_345_678) == "12.35 MB" and megabytes(12_345_678, 1) == "12.3 MB"
    assert short_bytes(123_449) == "123.4 kB" and short_bytes(1_000_000) == "1.0 MB"
    assert mebibytes(3 * 2**20) == "3.0 MiB" and mebibytes(5 * 2**30) == "5.00 GiB"
    assert clock(125.9) == "2:05"


def test_a_result_has_one_row_on_each_line():
    result = {"about": {"file": Path("mod.gguf")}, "rows": [{"n": 1}, {"n": 2}], "none": []}
    text = result_as_json(result)
    assert json.loads(text) == result | {"about": {"file": "mod.gguf"}}
    assert '{"n": 1},\n{"n": 2}' in text


def test_json_has_no_numbers_that_json_does_not_know():
    nan, infinity = float("nan"), float("inf")
    assert (
        json_text({"a": [nan, -infinity, 0.1], "b": None}) == '{"a": [null, null, 0.1], "b": null}'
    )
    result = {"about": {"share": nan}, "rows": [{"n": infinity}]}
    assert json.loads(result_as_json(result), parse_constant=pytest.fail) == {
        "about": {"share": None},
        "rows": [{"n": None}],
    }
