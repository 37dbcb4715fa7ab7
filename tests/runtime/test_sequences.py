"""Sequences that are written side by side draw their tokens as one alone does."""

import pytest

from mod_export.runtime.llama import MoDLlama
from mod_export.runtime.sampling import Sampling
from mod_export.runtime.sequences import write
from tests.support.tiny_gguf import Tiny

PROMPT = [5, 17, 40, 2]
N_TOKENS = 24


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    tiny = Tiny(n_layer=3, n_embd=64, n_ff=64, vocab=True)
    return tiny.write(tmp_path_factory.mktemp("sequences") / "dense.gguf")


def job():
    written = yield PROMPT
    return written.tokens


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=0, repeat_penalty=1.5),
        Sampling(temperature=0, frequency_penalty=1.0, presence_penalty=0.5),
    ],
)
def test_the_likeliest_tokens_are_those_of_generate(file, sampling):
    llm = MoDLlama(file, n_ctx=256, threads=1)
    expected = []
    for token in sampling.generate(llm, PROMPT):
        if llm.is_end(token) or llm.is_control(token) or len(expected) == N_TOKENS:
            break
        expected.append(token)
    llm.new_context(n_ctx=512, n_seq_max=2)
    found = [result for _, result, _ in write(llm, [job(), job()], 2, N_TOKENS, sampling)]
    assert found == [expected, expected]
    llm.close()


def test_a_penalty_changes_the_text(file):
    llm = MoDLlama(file, n_ctx=256, threads=1)
    texts = []
    for penalty in (1.0, 5.0):
        sampling = Sampling(temperature=0, repeat_penalty=penalty)
        llm.new_context(n_ctx=256, n_seq_max=1)
        ((_, text, _),) = write(llm, [job()], 1, N_TOKENS, sampling)
        texts.append(text)
    assert texts[0] != texts[1]
    llm.close()


def test_top_k_of_one_takes_the_likeliest(file):
    """And jobs draw different tokens without it."""
    llm = MoDLlama(file, n_ctx=256, threads=1)
    found = []
    for sampling in (
        Sampling(temperature=0),
        Sampling(temperature=2.0, top_p=1.0, top_k=1),
        Sampling(temperature=2.0, top_p=1.0),
    ):
        llm.new_context(n_ctx=512, n_seq_max=2)
        found.append([result for _, result, _ in write(llm, [job(), job()], 2, N_TOKENS, sampling)])
    assert found[0] == found[1] != found[2]
    assert found[2][0] != found[2][1]
    llm.close()
