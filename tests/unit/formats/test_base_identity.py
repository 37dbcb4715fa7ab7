"""Which model an adapter is for: the record of a GGUF, its checks, and what tells two models apart.

tests/unit/test_adapter.py compares torch models, tests/runtime/test_adapter_export.py compares
quantised files.
"""

import copy

import numpy as np
import pytest

from mod_export.errors import UserError
from mod_export.formats.base_identity import (
    SAMPLE_SIZE,
    check,
    compare,
    gguf_identity,
    sample_matrix,
    vocabulary_hash,
)
from mod_export.formats.gguf import GGUFFile
from tests.support.tiny_gguf import Tiny


def identity_of(path, **kwargs) -> dict:
    return gguf_identity(GGUFFile.open(Tiny(**kwargs).write(path / "x.gguf")))


def test_the_record_of_a_gguf(tmp_path):
    tiny = Tiny(vocab=True)
    identity = identity_of(tmp_path, vocab=True)
    assert identity["name"] == str(tmp_path / "x.gguf") and identity["model_type"] == "llama"
    assert (identity["n_layer"], identity["n_embd"], identity["n_vocab"]) == (5, 128, 96)
    assert len(identity["tokenizer"]) == 32
    matrix = tiny.tensors["token_embd.weight"]
    rows = [(2 * i + 1) * 96 // 16 for i in range(8)]
    columns = [(2 * i + 1) * 128 // 32 for i in range(16)]
    expected = matrix[np.ix_(rows, columns)].flatten()
    np.testing.assert_allclose(identity["weights"]["embedding"], expected, rtol=1e-3)
    assert sample_matrix((96, 128), matrix.__getitem__) == identity["weights"]["embedding"]
    assert check(identity, "here") is identity


def test_a_file_without_a_vocabulary_or_an_embedding(tmp_path):
    assert identity_of(tmp_path)["tokenizer"] == ""
    tiny = Tiny()
    path = tiny.write(tmp_path / "x.gguf", tensors={"token_embd.weight": None})
    found = gguf_identity(GGUFFile.open(path))
    assert (found["n_vocab"], found["weights"]) == (0, {})


def test_two_models(tmp_path):
    ours = identity_of(tmp_path, vocab=True)
    assert compare(ours, ours) == 0
    for other, words in (
        ({"n_layer": 4}, "with n_layer 5, .* has 4; give the model that it was made for"),
        ({"n_embd": 64}, "with n_embd 128, .* has 64"),
        ({"n_vocab": 97}, "with n_vocab 96, .* has 97"),
        ({"tokenizer": "another"}, "has another tokenizer"),
        ({"weights": {"embedding": [1.0] * SAMPLE_SIZE}}, "of the same shape has other weights"),
        ({"weights": {"embedding": [float("nan")] * SAMPLE_SIZE}}, "has other weights"),
    ):
        with pytest.raises(UserError, match=words):
            compare(ours, ours | other)
    # nothing is known of the tokenizer, or of the weights
    assert compare(ours | {"tokenizer": ""}, ours) == compare(ours, ours | {"weights": {}}) == 0
    noisy = copy.deepcopy(ours)
    values = noisy["weights"]["embedding"]
    values[:] = [value * 1.1 for value in values]
    assert compare(ours, noisy) == pytest.approx(0.1)


def test_gaps_in_a_vocabulary_do_not_count():
    tokens = {0: "a", 1: "b", 4: "c"}
    assert vocabulary_hash(tokens) == vocabulary_hash(tokens | {2: "[PAD2]", 3: "[PAD3]"})
    assert vocabulary_hash(tokens) != vocabulary_hash(tokens | {2: "[PAD3]"})
    assert vocabulary_hash({}) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": 1}, "mod.json: base.name is 1; get the adapter again"),
        ({"n_layer": True}, "base.n_layer is True"),
        ({"n_embd": 0}, "base.n_embd is 0"),
        ({"n_vocab": 2**32}, "base.n_vocab is 4294967296"),
        ({"weights": {"ffn": [1.0]}}, "base.weights.ffn is no list of 128 numbers"),
        ({"weights": {"ffn": "x" * SAMPLE_SIZE}}, "base.weights.ffn is no list"),
        ({"weights": {"ffn": [float("inf")] * SAMPLE_SIZE}}, "base.weights.ffn is no list"),
        ({"more": 1}, "base is not an object with the keys name, model_type"),
    ],
)
def test_damage_is_named(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        check(identity_of(tmp_path) | change, "mod.json")
    with pytest.raises(UserError, match="base is not an object"):
        check([], "mod.json")
