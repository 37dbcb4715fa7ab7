"""The unit tests do without llama.cpp."""

import sys

import pytest


@pytest.fixture(autouse=True)
def no_llama_cpp(monkeypatch):
    """An import of llama_cpp fails, also where tests of other tiers run in the same process."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
