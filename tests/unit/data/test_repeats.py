"""Tokens that say again what a text has said before."""

import numpy as np
import pytest

from mod_export.data import repeats
from mod_export.data.repeats import PASSAGE, Repeats


def exact(ids: np.ndarray) -> list[bool]:
    seen, marks = set(), []
    for end in range(1, len(ids) + 1):
        passage = (None,) * (PASSAGE - end) + tuple(ids[max(0, end - PASSAGE) : end])
        marks.append(passage in seen)
        seen.add(passage)
    return marks


@pytest.mark.parametrize("parts", [[], [1, 2, 5, 400], [1000]])
def test_marks_are_those_of_all_passages_so_far(parts):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, 2000)  # 6561 passages: many come again
    ids[1500:1700] = ids[100:300]
    expected = exact(ids)
    assert 200 < sum(expected) < 1800 and all(expected[1500 + PASSAGE - 1 : 1700])
    marks = Repeats()
    assert np.concatenate([marks.mark(part) for part in np.split(ids, parts)]).tolist() == expected


def test_passages_are_forgotten_in_time_but_for_those_that_come_again(monkeypatch):
    monkeypatch.setattr(repeats, "SLOTS", 1 << 12)
    rng, marks, header = np.random.default_rng(1), Repeats(), np.arange(100)
    once = rng.integers(0, 1000, 500)
    marks.mark(once)
    for _ in range(20):
        seen = marks.mark(np.concatenate((header, rng.integers(1000, 50000, 1000))))
    assert seen[PASSAGE - 1 : 100].mean() > 0.6  # 1100 passages since, in 4096 slots
    assert not seen[100:].any()
    assert marks.mark(once).mean() < 0.1


def test_no_tokens():
    assert Repeats().mark(np.zeros(0, np.int64)).tolist() == []
