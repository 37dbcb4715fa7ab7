"""A real model that finds a passkey."""

import pytest

from mod_export.data.text import default_texts
from mod_export.evaluation import passkey
from mod_export.evaluation.open import open_pair
from mod_export.formats import hub
from mod_export.runtime import bindings

TEXT = default_texts()[1]


@pytest.mark.skipif(
    not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`"
)
def test_passkeys_are_found_by_a_model_that_can():
    """SmolLM2's own GGUF; the same prompt without the key gives another answer."""
    pair = open_pair(hub.embedded_gguf(), threads=1)
    pair.reserve(200)
    trials = passkey.make_trials(pair.dense.tokenizer, TEXT, [200], depths=[0.3], n=1)
    (cell,) = passkey.retrieve(pair, trials)
    assert cell.right == {"dense": 1} and cell.trials == 1
    (row,) = passkey.by_length([cell])
    assert row["dense_by_depth"] == {"0.3": 1.0} and row["mod"] is row["kv_share"] is None
