"""The tiers of tests/conftest.py."""

import importlib

import pytest


def test_unit_tests_do_without_llama_cpp():
    with pytest.raises(ImportError):
        importlib.import_module("llama_cpp")


def test_a_test_belongs_to_the_tier_of_its_folder(request):
    for item in request.session.items:
        marks = {mark.name for mark in item.iter_markers()} & {"unit", "runtime", "slow"}
        assert len(marks) == 1 and f"tests/{marks.pop()}/" in item.path.as_posix()
