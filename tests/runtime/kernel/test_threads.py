"""The number of threads follows the load of the machine, unless the caller chose it."""

import itertools
import time

import pytest

from mod_export.common.system import usable_cpus
from mod_export.runtime import MoDLlama
from scripts.studies.neighbours import busy_loops
from tests.support.oracle import make

SECONDS = 30  # of decoding, at most; a tenth of a second is enough for one judgement

pytestmark = pytest.mark.skipif(usable_cpus() < 2, reason="one processor has one thread")


@pytest.fixture(scope="module")
def mod_file(tmp_path_factory):
    return make("all").write(tmp_path_factory.mktemp("threads") / "mod.gguf")


def decode_until(llm: MoDLlama, condition) -> bool:
    end = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < end:
        if llm.n_tokens == llm.n_ctx():
            llm.reset()
        llm.eval([5])
    return condition()


def test_threads_make_room_and_come_back(mod_file):
    llm = MoDLlama(mod_file, n_ctx=256)
    with busy_loops(usable_cpus()):  # which leaves half of the processors to the threads
        assert decode_until(llm, lambda: llm.running_threads <= usable_cpus() // 2)
    # all of them are tried again from time to time, whatever else runs
    assert decode_until(llm, lambda: llm.running_threads == usable_cpus())


def test_a_number_that_is_given_stays(mod_file):
    llm = MoDLlama(mod_file, n_ctx=256, threads=2)
    seen = set()
    with busy_loops(usable_cpus()):
        end = time.monotonic() + 0.5  # five judgements
        while time.monotonic() < end:
            llm.reset()
            llm.eval([5])
            seen.add(llm.running_threads)
    assert seen == {2}


def test_answers_do_not_depend_on_it_in_a_short_context(mod_file):
    answers = []
    for threads in (None, 1, 2):
        llm = MoDLlama(mod_file, n_ctx=256, threads=threads)
        with busy_loops(usable_cpus() if threads is None else 0):
            answers.append(list(itertools.islice(llm.generate([5, 6, 7], temp=0), 64)))
        llm.close()
    assert answers[0] == answers[1] == answers[2]
