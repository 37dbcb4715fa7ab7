"""Chat in a terminal (pty): typing, pasting, stopping; SmolLM2 has random routers."""

import ast
import re

import pytest

from mod_export.runtime import bindings
from tests.support.command_line import ROOT
from tests.support.terminal import terminal

LONG = 800  # tokens of an answer: what is typed after its first ones comes before its end
STATUS = r"\[\d+ tokens(, [\d.]+ tokens/s)?, "
# The conversation that a person has had, after /quit.
REPL = """
import sys
from mod_export.runtime.llama import MoDLlama
from mod_export.runtime.sampling import Sampling
from mod_export.serving import chat, terminal
llm, likeliest = MoDLlama(sys.argv[1], n_ctx=2048, threads=1), Sampling(temperature=0)
talk = chat.Chat(llm, sampling=likeliest, max_tokens=int(sys.argv[2]))
terminal.repl(talk)
print("ASKED", ascii([turn["content"] for turn in talk.history[::2]]))
"""


def talk(model, *options):
    return terminal("-m", "mod_export", "chat", model, "--threads", 1, *options)


def repl(model, max_tokens, **environment):
    return terminal("-c", REPL, model, max_tokens, **environment)


def asked(t) -> list[str]:
    """Leave; the questions that the conversation had."""
    t.send("/quit\r")
    return ast.literal_eval(t.expect(r"ASKED (.*)\r\n").split("ASKED ")[1])


def test_a_conversation_in_the_terminal(model):
    with talk(model, "--ctx", 1024, "--max-tokens", LONG, "--temperature", 0) as t:
        t.expect(r"/help lists the commands")
        t.expect("> ")
        t.send("Tell me a very long story about a lighthouse.\n")
        t.expect(r"story about a lighthouse\.\r\n[\s\S]{60}")  # it streams
        t.send("\x03")
        answer = t.expect(STATUS)
        assert int(re.search(r"\[(\d+) tokens", answer)[1]) < LONG  # stopped
        t.expect("> ")
        t.press_until("\x03", r"/quit or Ctrl-D")
        t.expect("> ")
        t.send("/stats\n")
        t.expect(r"KV [\d.]+ .B of dense .*; \d+ of \d+ cells")
        t.send("/nonsense\n")
        t.expect("unknown command /nonsense")
        t.send("/help\n")
        t.expect("Ctrl-C stops an answer")
        if bindings.patched():
            t.send("/threshold 0.5\n")
            t.expect(r"shifted by \+0\.5 in logit space")
        t.send("/reset\n")
        t.expect("conversation forgotten")
        t.send("/stats\n")
        t.expect("activation: no tokens were read yet\r\nKV 0.0 kB of dense 0.0 kB .none yet")
        t.send("/quit\n")
        assert t.close() == 0


def test_the_end_of_input_leaves(model):
    with talk(model, "--ctx", 256) as t:
        t.expect("> ")
        t.send("\x04")
        assert t.close() == 0


TEXT = "def f(x):\n    return x\n\n/quit\nñ 灯台"


def paste(t, text: str) -> None:
    """Do as xterm does, or as a terminal without marks of pastes."""
    text = text.replace("\n", "\r")
    t.send(text if t.environment.get("TERM") == "dumb" else f"\x1b[200~{text}\x1b[201~")


@pytest.fixture(params=["readline", "no readline", "dumb"])
def environment(request, tmp_path) -> dict[str, str]:
    """The environment of terminals with GNU readline, without any, and without marks of pastes."""
    if request.param == "dumb":
        return {"TERM": "dumb"}
    if request.param == "readline":
        return {}
    (tmp_path / "readline.py").write_text("raise ImportError")
    return {"PYTHONPATH": f"{tmp_path}:{ROOT}"}


def test_a_paste_is_one_question(model, environment):
    """Also one that comes while an answer is written, and one that begins like a command."""
    with repl(model, 150, **environment) as t:
        t.expect("> ")
        paste(t, TEXT)
        t.send("\r")
        t.expect(STATUS)
        t.expect("> ")
        t.send("Tell me a very long story.\r")
        t.expect(r"long story\.\r\n[\s\S]{60}")  # It is being written.
        paste(t, "/stats\n" + TEXT)
        t.send("\r")
        t.expect(STATUS)
        t.expect(STATUS)
        assert asked(t) == [TEXT, "Tell me a very long story.", "/stats\n" + TEXT]


def test_questions_of_several_lines_by_hand(model):
    with repl(model, 2) as t:
        for line in ('"""one', "/quit", '  two"""', " /stats", '"""three"""', "/usr/bin is what?"):
            t.send(line + "\r")
        for _ in range(4):
            t.expect(STATUS)
        t.send("/stat\r")
        t.expect("error: unknown command /stat; the commands are /reset")
        t.send("/help me\r")
        t.expect("error: unknown command /help me")
        assert asked(t) == ["one\n/quit\n  two", "/stats", "three", "/usr/bin is what?"]


def test_long_lines_bytes_that_are_no_text_and_the_history(model):
    long = "=" * 5000  # more than the 4096 bytes of a terminal's own line
    with repl(model, 2) as t:
        t.expect("> ")
        paste(t, "a\nb")
        t.send("\r")
        t.expect(STATUS)
        t.send("\x1b[A\r")  # arrow up
        t.expect(STATUS)
        t.send(f"{long}\r")
        t.expect(STATUS)
        for byte in "灯台\r".encode():
            t.send_bytes(bytes([byte]))
            t.resize(24, 40)
        t.expect(STATUS)
        t.send_bytes(b"caf\xe9\r")
        t.expect(STATUS)
        assert asked(t)[:4] == ["a\nb", "a\nb", long, "灯台"]


def test_only_answers_go_to_a_file(model, tmp_path):
    out = tmp_path / "answers.txt"
    code = f"import os; os.dup2(os.open({str(out)!r}, os.O_WRONLY | os.O_CREAT), 1)\n" + REPL
    with terminal("-c", code, model, 8) as t:
        t.expect("> ")
        t.send("Hello\r")
        t.expect(STATUS)
        t.expect("> ")
        t.send("\x04")
        assert t.close() == 0
    answer, asked = out.read_text().rsplit("ASKED ", 1)
    assert asked.strip() == "['Hello']"
    assert answer.strip() and not re.search(r"[>\x1b]|\[", answer)
