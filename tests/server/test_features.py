"""What llama-server offers beside slots, on MoD memories: drafts, LoRA, the prompt cache, --fit."""

import re

import pytest

from mod_export.formats.gguf import GGUFFile
from tests.support.completions import TEXT, anew, ask, same_answer, tokens
from tests.support.llama_server import started
from tests.support.lora_files import write_lora

STORY = TEXT * 3
DRAFTED = 20
DRAFTS = ("-np", "1", "--spec-type", "draft-simple", "-md")


@pytest.fixture(scope="module")
def lora(mod, tmp_path_factory):
    """Random LoRA on the queries of all layers."""
    path = tmp_path_factory.mktemp("lora") / "lora.gguf"
    names = [f"blk.{layer}.attn_q.weight" for layer in range(30)]
    write_lora(path, GGUFFile.open(mod).architecture, dict.fromkeys(names, (576, 576)))
    return path


@pytest.fixture(scope="module")
def server(mod, lora):
    """One slot, so that its prompts go into the prompt cache in RAM."""
    more = ("-np", "1", "--cache-ram", "256", "--lora-scaled", f"{lora}:0")
    with started(mod, "--ctx", "2048", more=more) as server:
        yield server


@pytest.mark.parametrize("draft", ["dense", "mod"])
def test_drafts_change_no_answer(request, mod, server, draft):
    """Also where more are drafted than can be taken back, and where the draft model forgets too."""
    more = (*DRAFTS, request.getfixturevalue(draft), "--spec-draft-n-max", "100")
    with started(mod, "--ctx", "2048", more=more) as drafting:
        words = tokens(drafting, STORY)
        for n, prompt in enumerate((words, words[:60] + words[30:90], words[:40], words)):
            length = {"n_predict": DRAFTED if n else 80}
            answer = ask(drafting, prompt, **length)
            assert same_answer(answer, anew(server, prompt, **length))
            timings = answer["timings"]
            assert timings["draft_n"] >= timings["draft_n_accepted"] > 0
        assert timings["mod"]["activation"]["kv"] < 1


def test_a_draft_model_that_forgets_serves_a_dense_one(mod, dense):
    """The server would die where the dense model goes back and its draft model cannot."""
    with (
        started(dense, "--ctx", "2048", more=(*DRAFTS, mod)) as drafting,
        started(dense, "--ctx", "2048", more=("-np", "1")) as plain,
    ):
        words = tokens(drafting, STORY)
        for prompt in (words, words[:60] + words[30:90], words[:40], words):
            answer = ask(drafting, prompt, n_predict=DRAFTED)
            assert answer["timings"]["draft_n_accepted"] > 0
            assert same_answer(answer, anew(plain, prompt, n_predict=DRAFTED))


def test_lora_belongs_to_a_request(server):
    """K/V that were made with it are of no use without it."""
    with_ = {"lora": [{"id": 0, "scale": 3.0}]}
    plain, adapted = anew(server, STORY), anew(server, STORY, **with_)
    assert not same_answer(plain, adapted)
    for changes, right in (({}, plain), (with_, adapted), ({}, plain), (with_, adapted)):
        assert same_answer(ask(server, STORY, **changes), right)
    assert [one["scale"] for one in server.get("/lora-adapters")] == [0]


def test_prompts_come_back_from_the_cache_in_ram(server):
    other = "Nothing of this was read before: " + TEXT[::-1] * 2
    first = ask(server, STORY)
    ask(server, other)
    again = ask(server, STORY)
    assert same_answer(again, first)
    assert again["timings"]["cache_n"] > 0.8 * len(tokens(server, STORY))
    shifted = ask(server, other, threshold_shift=1.0)
    assert shifted["timings"]["cache_n"] == 0
    assert same_answer(shifted, anew(server, other, threshold_shift=1.0))


def test_a_grammar_holds(server):
    answer = ask(server, STORY, grammar='root ::= "yes" | "no"')
    assert answer["content"] in ("yes", "no")


def test_the_context_that_the_model_was_made_for(mod):
    """--fit is on by default, and looks at what a context would take before it is made."""
    with started(mod, "--ctx", "0", more=("--fit", "on", "-np", "8")) as server:
        assert server.get("/props")["default_generation_settings"]["n_ctx"] == 8192
        assert len(server.get("/slots")) == 8
        assert ask(server, STORY)["content"]


def test_a_context_that_does_not_fit(mod, dense, run_cli):
    for file, ctx in ((mod, 2_000_000_000), (dense, 1 << 24)):
        done = run_cli("serve", file, "--ctx", ctx)
        assert done.returncode == 2 and done.stdout == ""
        assert re.fullmatch(r"error: a context of .* memory .*smaller context\n", done.stderr)
