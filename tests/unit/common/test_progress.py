"""The line that tells how far work has come: in place on a terminal, else now and then."""

import io
import logging
import re
import threading
import time

import pytest

from mod_export.cli.output import hide_messages, show_messages
from mod_export.common import progress as progress_module
from mod_export.common.progress import Progress, stage


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_lines_come_now_and_then(monkeypatch):
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    progress = Progress(stream)
    for item in progress.count("prefill", range(8)):
        now[0] = 10.0 * (item + 1)
    # the first 5 s are silent, and so are 15 s after each line
    assert stream.getvalue().splitlines() == [
        "prefill: 2 of 8, 1:10 left",
        "prefill: 4 of 8, 0:50 left",
        "prefill: 6 of 8, 0:30 left",
        "prefill: 8 of 8, 0:10 left",
    ]


def test_work_in_one_piece_tells_its_time(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "mod_export")
    with stage("loading"):
        pass
    assert caplog.messages == []
    monkeypatch.setattr(progress_module, "FIRST_SECONDS", 0.01)
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.01)
    with pytest.raises(ValueError, match="wrong"), stage("loading"):
        while len(caplog.messages) < 2:
            time.sleep(0.01)
        raise ValueError("wrong")
    assert all(re.fullmatch(r"loading: 0:\d\d so far", line) for line in caplog.messages)
    assert not [thread for thread in threading.enumerate() if "tell" in thread.name]


def test_a_process_whose_logger_is_off_shows_nothing(monkeypatch):
    monkeypatch.setattr(progress_module, "FIRST_SECONDS", -1.0)
    package, stream = logging.getLogger("mod_export"), io.StringIO()
    before = package.level
    package.setLevel(logging.CRITICAL + 1)
    try:
        Progress(stream).show("a line")
    finally:
        package.setLevel(before)
    assert stream.getvalue() == ""
    Progress(stream).show("a line")
    assert stream.getvalue() == "a line\n"


def test_a_share_and_a_note(monkeypatch):
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    progress = Progress(stream)
    now[0] = 20.0
    progress.tell("generating", 3, 4, "3 of 4", before=1)
    assert stream.getvalue() == "generating: 75%, 3 of 4, 0:10 left\n"


def test_a_terminal_has_one_line_with_a_bar():
    stream = Terminal()
    progress = Progress(stream)
    seen = list(progress.count("prefill", "ab"))
    progress.show("step 1 of 2")
    progress.clear()
    text = stream.getvalue()
    assert seen == ["a", "b"] and "\n" not in text
    assert "prefill: 1 of 2  |" in text and "prefill: 2 of 2, 0:00 left  |" in text
    assert "step 1 of 2" in text and text.endswith("\r")


def test_a_message_stands_alone_beside_a_bar(monkeypatch):
    """The bar is wiped before the line, and drawn again after it."""
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    progress = Progress()
    progress.show("working", 0.5)
    before = len(stream.getvalue())
    show_messages()
    logging.getLogger("mod_export.test").info("a line")
    hide_messages()
    progress.clear()
    text = stream.getvalue()[before:]
    wiped, line, bar = text.partition("a line\n")
    assert line and wiped.strip("\r ") == "" and wiped.endswith("\r") and "working" in bar
