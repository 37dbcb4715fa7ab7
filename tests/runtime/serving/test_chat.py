"""Chat as a person uses it: one shot, pipes, and a terminal (pty); SmolLM2 has random routers."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from mod_export.errors import UserError
from mod_export.runtime import bindings
from mod_export.runtime.llama import MoDLlama
from mod_export.serving.chat import CHAT_SAMPLING, Chat
from mod_export.serving.terminal import is_script

LIKELIEST = replace(CHAT_SAMPLING, temperature=0)
ROOT = Path(__file__).parents[3]
STATUS = r"\[\d+ tokens(, [\d.]+ tokens/s)?, "


def test_one_shot_prints_the_answer_alone(model, run_cli):
    done = run_cli(
        "chat",
        model,
        "--prompt",
        "Name a colour.",
        "--max-tokens",
        12,
        "--temperature",
        0,
        "--threads",
        1,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "[" not in done.stdout
    assert re.search(STATUS, done.stderr)
    if bindings.patched():
        assert re.search(
            r"activation 0\.\d\d, KV [\d.]+ .B of dense [\d.]+ .B \(\d+%\)", done.stderr
        )


def test_bad_prompts(model, run_cli):
    for args, word in (
        (("--prompt", ""), "empty"),
        (("--prompt", "word " * 300, "--ctx", 256), "context of 256"),
        (("--prompt", "hi", "--temperature", -1), "--temperature"),
    ):
        done = run_cli("chat", model, *args)
        assert (done.returncode, done.stdout) == (2, "")
        assert (
            done.stderr.startswith("error: ")
            and done.stderr.count("\n") == 1
            and word in done.stderr
        )


def piped(model, text: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "mod_export",
        "chat",
        model,
        "--max-tokens",
        "8",
        "--ctx",
        "512",
        "--threads",
        "1",
    ]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, cwd=ROOT, timeout=200
    )


def test_pipes(model):
    done = piped(model, "Say one word.\n")
    assert done.returncode == 0 and done.stdout.strip()
    done = piped(model, "Hello\n/stats\n/threshold x\n/reset\n/quit\nnever asked\n")
    assert len(re.findall(STATUS, done.stderr)) == 1
    assert "conversation forgotten" in done.stderr and "KV:" in done.stderr
    assert done.returncode == 2  # /threshold x
    assert not is_script("one prompt\nof two lines") and is_script("Hello\n/stats")


class Terminal:
    """The chat at the other end of a pty."""

    def __init__(self, model, *options):
        command = [sys.executable, "-m", "mod_export", "chat", str(model), "--threads", "1"]
        command += map(str, options)
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execv(sys.executable, command)
        self.text = ""

    def expect(self, pattern: str, timeout: float = 120) -> str:
        """Reads until the pattern comes; returns what was read, and forgets it."""
        end = time.monotonic() + timeout
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.text!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                self.text += os.read(self.fd, 4096).decode("utf-8", "replace")
        read, self.text = self.text[: match.end()], self.text[match.end() :]
        return read

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def press_until(self, key: str, pattern: str) -> None:
        """Presses a key until the pattern comes, as a person would.

        A Ctrl-C between the prompt's last character and Python's wait for a line is heard at the
        next key only: a gap of microseconds that a busy machine makes long.
        """
        for _ in range(20):
            self.send(key)
            with suppress(AssertionError):
                self.expect(pattern, timeout=2)
                return
        raise AssertionError(f"no {pattern!r} in {self.text!r}")

    def close(self) -> int:
        """The exit code."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    os.read(self.fd, 4096)
                except OSError:  # the other end has closed
                    break
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextmanager
def terminal(model, *options):
    t = Terminal(model, *options)
    try:
        yield t
    finally:
        try:
            os.kill(t.pid, signal.SIGKILL)
            os.waitpid(t.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(t.fd)


def test_a_conversation_in_the_terminal(model):
    with terminal(model, "--ctx", 1024, "--max-tokens", 300, "--temperature", 0) as t:
        t.expect(r"/help lists the commands")
        t.expect("> ")
        t.send("Tell me a very long story about a lighthouse.\n")
        t.expect(r"story about a lighthouse\.\r\n(.*\w+\W+){5}")  # it streams
        t.send("\x03")
        answer = t.expect(STATUS)
        assert int(re.search(r"\[(\d+) tokens", answer)[1]) < 300  # stopped
        t.expect("> ")
        t.press_until("\x03", r"/quit or Ctrl-D")
        t.expect("> ")
        t.send("/stats\n")
        t.expect(r"KV: \d+ of \d+ cells")
        t.send("/nonsense\n")
        t.expect("unknown command /nonsense")
        t.send("/help\n")
        t.expect("Ctrl-C stops an answer")
        if bindings.patched():
            t.send("/threshold 0.5\n")
            t.expect(r"shifted by \+0\.5 in logit space")
        t.send("/reset\n")
        t.expect("conversation forgotten")
        t.send("/quit\n")
        assert t.close() == 0


def test_the_end_of_input_leaves(model):
    with terminal(model, "--ctx", 256) as t:
        t.expect("> ")
        t.send("\x04")
        assert t.close() == 0


def test_history_is_remembered_reused_and_dropped_when_full(model):
    said = []
    llm = MoDLlama(model, n_ctx=256, n_batch=64, threads=1)
    chat = Chat(llm, "Be brief.", LIKELIEST, max_tokens=8, notice=said.append)
    "".join(chat.ask("My name is Ada."))
    assert [m["role"] for m in chat.history] == ["user", "assistant"]
    read = llm.input_ids[: llm.n_tokens].tolist()
    "".join(chat.ask("And yours?"))
    assert llm.input_ids[: len(read)].tolist() == read  # the second prompt goes on from the first
    for _ in range(3):
        "".join(
            chat.ask("Of the sea, the sky, the mountains, the woods and the fields, tell me. " * 5)
        )
    assert any("context full: the oldest" in line for line in said)
    assert llm.n_tokens <= 256
    assert chat.history[0]["role"] == "user" and len(chat.history) < 8
    with pytest.raises(UserError, match="does not fit a context of 256"):
        "".join(chat.ask("word " * 300))
    chat.reset()
    assert (chat.history, llm.n_tokens) == ([], 0)
    if bindings.patched():
        assert llm.kv().cells_used == 0


@pytest.fixture
def talk(model):
    """(a chat with one question answered, that turn's activation, what it says)"""
    if not bindings.patched():
        pytest.skip("needs the patched llama.cpp: run `mod-export build`")
    said = []
    chat = Chat(
        MoDLlama(model, n_ctx=512, threads=1), "", LIKELIEST, max_tokens=4, notice=said.append
    )
    "".join(chat.ask("What is a lighthouse? Say it in a few words."))
    return chat, chat.turn.active / chat.turn.seen, said


def test_the_threshold_acts_from_the_next_token_on(talk):
    chat, first, said = talk
    before, units = chat.llm.n_tokens, len(chat.llm.units)
    chat.set_shift("1.5")
    "".join(chat.ask("And a buoy?"))
    read = chat.llm.n_tokens - before
    assert chat.turn.seen <= (read + 8) * units  # the new question and answer, not the conversation
    assert chat.turn.active / chat.turn.seen < first - 0.1
    assert "at shift +1.5" in chat.status() and "from the next token on" in said


def test_the_threshold_for_all_reads_the_conversation_again(talk):
    chat, first, said = talk
    chat.set_shift("1.5 all")
    "".join(chat.ask("And a buoy?"))
    assert chat.turn.seen == chat.llm.n_tokens * len(chat.llm.units)
    assert chat.turn.active / chat.turn.seen < first - 0.1
    assert "the next answer reads the conversation again with it" in said


def test_bad_thresholds(talk):
    chat = talk[0]
    for bad in ("nan", "much", "1 some"):
        with pytest.raises(UserError):
            chat.set_shift(bad)
    assert chat.llm.shift == 0
