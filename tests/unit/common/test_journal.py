"""Records that outlive a stopped run."""

import json

import pytest

from mod_export.common.files import locked
from mod_export.common.journal import Journal
from mod_export.errors import UserError


def test_a_stopped_run_goes_on(tmp_path):
    out, path = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with Journal(out, {"seed": 1}) as journal:
        journal.add({"id": 0})
        journal.add({"id": 3, "text": "ü"})
    with path.open("ab") as file:
        file.write(b'{"id": 4, "te')  # cut off
    with Journal(out, {"seed": 1}) as journal:
        assert (journal.count, journal.following) == (2, 4)
        journal.add({"id": 4})
        assert [json.loads(line)["id"] for line in journal.lines()] == [0, 3, 4]
        journal.done()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_journal_does_not_stay(tmp_path):
    with Journal(tmp_path / "out", {}) as journal:
        assert journal.path.is_file()
    assert list(tmp_path.iterdir()) == []


def test_other_options_and_other_processes_are_refused(tmp_path):
    out, path = tmp_path / "out", tmp_path / "out.partial"
    with Journal(out, {"seed": 1}) as journal:
        journal.add({"id": 0})
    with pytest.raises(UserError, match="other options: seed was 1, is 2"):
        Journal(out, {"seed": 2})
    with (
        locked(path, busy=lambda: None),
        pytest.raises(UserError, match="another process is writing .*out.partial"),
    ):
        Journal(out, {"seed": 1})
    with Journal(out, {"seed": 1}) as journal:  # neither has held the lock
        assert journal.count == 1
    with pytest.raises(UserError, match="cannot write"):
        Journal(tmp_path / "none" / "out", {})
