"""Greedy answers of a llama-server that drafts, compared with those of one that does not.

drafted, accepted = check_drafts(file, "draft-simple", "-md", draft)
"""

from __future__ import annotations

from mod_export.synthetic.onto_base import onto
from mod_export.synthetic.routers import SynthesisOptions
from tests.support.completions import TEXT, ask, tokens
from tests.support.llama_server import started

STORY = TEXT[:500]
# Everything in f32: answers are the same to the token. Flash attention would round K and V to f16,
# and otherwise in a batch of another size, so that a random model would now and then choose
# another expert, unit or token.
PLAIN = ("-np", "1", "-fa", "off", "--cache-type-k", "f32", "--cache-type-v", "f32")
DRAFTS = (*PLAIN, "--spec-draft-n-max", "5", "--spec-type")


def with_routers(file, folder, kinds: str):
    """Write a file with random routers of these kinds, of windows that a story is longer than."""
    path = folder / "mod.gguf"
    onto(file, path, SynthesisOptions(kinds, "0.5", kv_window=16), rounds=2)
    return path


def answers(file, *more, **request) -> list[dict]:
    """Answers to a story, an edited one, its beginning, and the story again, of one slot."""
    with started(file, "--ctx", "2048", more=more) as server:
        words = tokens(server, STORY)
        prompts = (words, words[:60] + words[30:90], words[:40], words)
        request |= {"n_predict": 40, "return_tokens": True}
        return [ask(server, prompt, **request) for prompt in prompts]


def tokens_of(found: list[dict]) -> list[list[int]]:
    """Return the tokens of each answer."""
    return [answer["tokens"] for answer in found]


def counts(found: list[dict]) -> list[tuple[int, int]]:
    """Return (drafted, accepted) tokens of each answer."""
    return [(a["timings"]["draft_n"], a["timings"]["draft_n_accepted"]) for a in found]


def check_drafts(file, *drafts) -> tuple[int, int]:
    """Return (drafted, accepted) tokens of answers that are those without drafts."""
    found = answers(file, *DRAFTS, *drafts)
    assert tokens_of(found) == tokens_of(answers(file, *PLAIN, cache_prompt=False))
    assert found[-1]["timings"]["mod"]["activation"]
    drafted, accepted = zip(*counts(found), strict=True)
    return sum(drafted), sum(accepted)
