"""The protocol between a benchmark and its processes, with a process that runs no model."""

from pathlib import Path

import pytest

from mod_export.benchmark.processes import Worker
from mod_export.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
MODULE = "tests.support.counting_worker"


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with Worker("counting", {"start": 5}, module=MODULE) as worker:
        yield worker


def test_answers_and_progress(worker):
    assert worker.about == {"start": 5}
    seen = []
    assert worker.ask(on_progress=seen.append, do="count", n=3) == {"sum": 5 + 6 + 7}
    assert seen == [5, 6, 7]
    assert worker.ask(do="count", n=1) == {"sum": 5}


def test_what_a_process_prints_is_no_answer(worker):
    assert worker.ask(do="chat") == {"said": "much"}


def test_errors_name_the_process(worker):
    with pytest.raises(UserError, match="counting: the count is negative; use a larger one"):
        worker.ask(do="count", n=-1)


def test_a_bug_is_one_line(worker):
    with pytest.raises(UserError, match="counting: ZeroDivisionError: "):
        worker.ask(do="divide", n=0)


def test_a_process_that_ends(worker):
    with pytest.raises(UserError, match=r"counting ended with code 3: GGML_ASSERT\(n"):
        worker.ask(do="leave", code=3)


def test_a_setup_that_is_none(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(UserError, match="^TypeError: "):
        Worker("", {"no": "setup"}, module=MODULE)
