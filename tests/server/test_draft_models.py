"""Draft models that read the inputs of layers: EAGLE-3, DFlash and DSpark."""

import pytest

from tests.support.draft_models import with_layers
from tests.support.drafting import DRAFTS, answers, check_drafts, counts, tokens_of, with_routers
from tests.support.gguf_models import write_models
from tests.support.llama_server import LlamaServer
from tests.support.model_types import MODEL_TYPES

# One of the models is a hybrid. Tied embeddings let a model say tokens twice.
MODELS = {
    name: (MODEL_TYPES[name][0], MODEL_TYPES[name][1] | {"tie_word_embeddings": True})
    for name in ("llama", "nemotron_h")
}
# 8 is what the last layer of the hybrid puts out
LAYERS = {"llama": [1, 2, 3], "nemotron_h": [1, 4, 8]}
ALL_ACTIVE = -99  # as a shift of the thresholds


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("dense"), MODELS)


@pytest.fixture(scope="module")
def routed(dense, tmp_path_factory):
    """(name, kinds) -> a file with routers"""
    return lambda name, kinds: with_routers(dense[name], tmp_path_factory.mktemp("routed"), kinds)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "eagle3"), ("llama", "dflash"), ("nemotron_h", "eagle3"), ("nemotron_h", "dspark")],
)
def test_drafts_beside_kv_units(dense, routed, tmp_path, name, kind):
    """Answers stay, and where all units are active the draft reads, and drafts, as beside dense."""
    draft = with_layers(dense[name], tmp_path / "draft.gguf", kind, LAYERS[name])
    file, more = routed(name, "kv"), (f"draft-{kind}", "-md", draft)
    drafted, accepted = check_drafts(file, *more)
    assert drafted > accepted > 5
    active = answers(file, *DRAFTS, *more, threshold_shift=ALL_ACTIVE)
    expected = answers(dense[name], *DRAFTS, *more)
    assert tokens_of(active) == tokens_of(expected)
    assert counts(active) == counts(expected)


@pytest.mark.parametrize(
    ("kind", "kinds", "unit"),
    [("eagle3", "attn+kv", "attn"), ("dflash", "block", "block"), ("dspark", "ffn", "ffn")],
)
def test_other_kinds_are_refused_by_name(dense, routed, tmp_path, kind, kinds, unit):
    """The server went on without drafts."""
    draft = with_layers(dense["llama"], tmp_path / "draft.gguf", kind, LAYERS["llama"])
    found = ends(routed("llama", kinds), kind, draft)
    assert "beside kv units only, but layer" in found
    assert f"has a router for '{unit}'" in found


@pytest.mark.parametrize(
    ("kind", "what"), [("eagle3", "the hidden state behind the last layer"), ("dflash", "layer 4")]
)
def test_what_a_graph_does_not_have_is_refused_by_name(dense, routed, tmp_path, kind, what):
    draft = with_layers(dense["llama"], tmp_path / "draft.gguf", kind, [1, 2, 4])
    found = ends(routed("llama", "kv"), kind, draft)
    assert f"{what}: the graph of architecture 'llama' does not have it" in found


def ends(file, kind, draft) -> str:
    """Return what a server says that ends before it has loaded."""
    with pytest.raises(AssertionError) as error:
        LlamaServer(file, more=(*DRAFTS, f"draft-{kind}", "-md", draft))
    return str(error.value)
