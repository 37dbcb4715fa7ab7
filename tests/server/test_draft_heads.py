"""Drafts of a head for multi-token prediction, and plain ones beside units that skip."""

import pytest

from mod_export.export import export
from tests.support.draft_heads import LAYER, NAMES, write_models_with_heads
from tests.support.drafting import DRAFTS, STORY, check_drafts, with_routers
from tests.support.llama_server import LlamaServer
from tests.support.tiny_adapter import save_for


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """name -> a file with a head"""
    return write_models_with_heads(tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="module")
def routed(dense, tmp_path_factory):
    """(name, kinds) -> the same with routers"""
    return lambda name, kinds: with_routers(dense[name], tmp_path_factory.mktemp("routed"), kinds)


@pytest.mark.parametrize("name", NAMES)
def test_a_head_beside_kv_units_changes_no_answer(routed, name):
    """A text that is read again at an earlier end ended the server of a hybrid."""
    drafted, accepted = check_drafts(routed(name, "kv"), "draft-mtp")
    assert drafted > accepted
    assert accepted > 20 or name == "qwen3_5"  # whose text repeats nothing


def test_a_head_that_came_along_with_trained_weights_drafts(dense, tmp_path):
    source, lora = dense["glm4_moe"], tmp_path / "lora"
    save_for(source, {"kv": [1, LAYER]}, lora, lora_for=STORY)
    drafted, accepted = check_drafts(
        export(lora, tmp_path / "mod.gguf", "f32", base=source), "draft-mtp"
    )
    assert drafted > accepted > 0


@pytest.mark.parametrize("kinds", ["attn+kv", "block", "ffn"])
def test_a_plain_draft_model_works_beside_other_kinds(routed, dense, kinds):
    drafted, accepted = check_drafts(
        routed("glm4_moe", kinds), "draft-simple", "-md", dense["glm4_moe"]
    )
    assert drafted > accepted > 0


def test_a_head_beside_other_kinds_is_refused_by_name(routed):
    with pytest.raises(AssertionError) as error:
        LlamaServer(routed("glm4_moe", "ffn+kv"), more=(*DRAFTS, "draft-mtp"))
    assert "beside kv units only, but layer" in str(error.value)
    assert "has a router for 'ffn'" in str(error.value)


def test_a_draft_model_that_cannot_go_back_is_refused(routed, dense):
    """A hybrid beside a model without recurrent states ended the server, upstream's too."""
    with pytest.raises(AssertionError, match="the draft model has recurrent states, from which"):
        LlamaServer(
            routed("glm4_moe", "kv"), more=(*DRAFTS, "draft-simple", "-md", dense["qwen3_5"])
        )
