"""llama-server on a hybrid with routers: its states cannot be taken back token by token."""

import re

import pytest

from mod_export.synthetic.onto_base import onto
from mod_export.synthetic.routers import SynthesisOptions
from tests.support.completions import TEXT, anew, ask, same_answer, tokens
from tests.support.gguf_models import write_models
from tests.support.llama_server import started

LFM2 = {
    "num_hidden_layers": 6,
    "layer_types": ["conv", "full_attention", "conv"] * 2,
    "block_auto_adjust_ff_dim": False,
    "block_ff_dim": 96,
    "conv_L_cache": 3,
}
STORY = TEXT[:500]
DRAFTS = ("-np", "1", "--spec-type", "draft-simple", "--spec-draft-n-max", "5", "-md")


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """(the dense file, the same with routers)"""
    folder = tmp_path_factory.mktemp("hybrid")
    dense = write_models(folder, {"lfm2": ("lfm2", LFM2)})["lfm2"]
    options = SynthesisOptions("ffn+kv", "0.5", kv_window=16)
    onto(dense, folder / "mod.gguf", options, rounds=2)
    return dense, folder / "mod.gguf"


def test_answers_are_those_of_a_text_that_is_read_anew(hybrid):
    """Texts that go on, are edited, end earlier, come back; two slots in turn."""
    with started(hybrid[1], "--ctx", "2048", more=("-np", "2", "-ub", "64")) as server:
        words = tokens(server, STORY)
        edited = words[:300] + words[10:60]
        for slot, prompt in enumerate((words, words[:200], edited, words[:250], words + edited)):
            answer = ask(server, prompt, id_slot=slot % 2)
            assert same_answer(answer, anew(server, prompt, id_slot=slot % 2)), prompt
        prompt = (words + edited)[:-2] + words[:9]  # from the last checkpoint on
        again = ask(server, prompt, id_slot=0)
        assert again["timings"]["cache_n"] > len(words)
        assert again["timings"]["mod"]["activation"]["kv"] < 1
        assert same_answer(again, anew(server, prompt, id_slot=0))


def test_checkpoints_are_as_rare_as_those_of_the_dense_model(hybrid):
    """One was made for each ubatch of a prompt, with all states."""
    made = []
    for file in hybrid:
        with started(file, "--ctx", "2048", more=("-np", "1", "-ub", "64", "-lv", "4")) as server:
            words = tokens(server, STORY)
            for prompt in (words, words + words[:90], words[:250] + words[:200]):
                ask(server, prompt)
            found = re.findall(r"created context checkpoint.*?n_tokens = (\d+)", server.text)
            made.append(list(map(int, found)))
    assert made[0] == made[1] and 3 <= len(made[0]) <= 6, made


@pytest.mark.parametrize("draft", [0, 1])
def test_drafts_change_no_answer(hybrid, draft):
    with (
        started(hybrid[1], "--ctx", "2048", more=(*DRAFTS, hybrid[draft])) as drafting,
        started(hybrid[1], "--ctx", "2048", more=("-np", "1")) as plain,
    ):
        words = tokens(drafting, STORY)
        for prompt in (words, words[:60] + words[30:90], words[:40], words):
            answer = ask(drafting, prompt, n_predict=40)
            assert answer["timings"]["draft_n"] > 0
            assert same_answer(answer, anew(plain, prompt, n_predict=40))
