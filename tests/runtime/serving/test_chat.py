"""Chat as a person uses it: one shot, pipes and conversations; SmolLM2 has random routers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mod_export.errors import UserError
from mod_export.runtime import bindings
from mod_export.runtime.llama import MoDLlama
from mod_export.runtime.sampling import Sampling
from mod_export.serving.chat import Chat
from mod_export.serving.terminal import is_script
from tests.support.tiny_gguf import Tiny

LIKELIEST = Sampling(temperature=0, repeat_penalty=1.1)
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
            r"activation 0\.\d\d, KV [\d.]+ .B of dense [\d.]+ .B \(100%, saving begins after \d+ "
            r"tokens\)",
            done.stderr,
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
        "--seed",
        "5",  # another draw may be an empty answer
    ]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, cwd=ROOT, timeout=200
    )


def test_pipes(model):
    done = piped(model, "Say one word.\n")
    assert done.returncode == 0 and done.stdout.strip()
    done = piped(model, "Hello\n/stats\n/threshold x\n/reset\n/quit\nnever asked\n")
    assert len(re.findall(STATUS, done.stderr)) == 1
    assert "conversation forgotten" in done.stderr and " cells, committed" in done.stderr
    assert done.returncode == 2  # /threshold x
    assert is_script("Hello\n/stats") and is_script("/threshold 0.5")
    for text in ("one prompt\nof two lines", "Hello\n/stats of the league", "/usr/bin\n /stats"):
        assert not is_script(text)


@pytest.mark.skipif(not bindings.patched(), reason="needs the patched llama.cpp")
def test_units_of_heads_are_told_apart(tmp_path):
    tiny = Tiny(n_layer=4, n_embd=64, n_ff=64, vocab=True).route([2], "heads").route([3], "ffn")
    llm = MoDLlama(tiny.write(tmp_path / "mod.gguf"), n_ctx=256, threads=1)
    table = Chat(llm, raw=True).stats().splitlines()
    assert table[0].split()[:3] == ["layer", "kind", "head"]
    assert [line.split()[:3] for line in table[2:5]] == [
        ["2", "kv", "0"],
        ["2", "kv", "1"],
        ["3", "ffn", "-"],
    ]


def test_raw_texts_are_continued(model):
    """Without a template the model reads the texts of all turns, one after the other."""
    llm = MoDLlama(model, n_ctx=256, n_batch=64, threads=1)
    chat = Chat(llm, sampling=LIKELIEST, max_tokens=6, notice=lambda line: None, raw=True)
    first = "".join(chat.ask("The capital of France is"))
    second = "".join(chat.ask(" And that of Italy is"))
    text = f"The capital of France is{first} And that of Italy is{second}"
    read = llm.input_ids[: llm.n_tokens].tolist()
    assert llm.detokenize(read, special=True).decode() in text and "<|im_start|>" not in text
    llm.reset()
    expected = LIKELIEST.generate(llm, llm.tokenize(b"The capital of France is", add_bos=False))
    assert first == "".join(llm.piece(next(expected)).decode() for _ in range(6))


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
    before = list(chat.history)
    with pytest.raises(UserError, match="does not fit a context of 256"):
        "".join(chat.ask("word " * 300))
    assert chat.history == before
    chat.reset()
    assert (chat.history, llm.n_tokens) == ([], 0)
    if bindings.patched():
        assert llm.kv().cells_used == 0


class Counting(MoDLlama):
    """Counts the tokens that are read and written."""

    evaluated = 0

    def _decode(self, tokens):
        self.evaluated += len(tokens)
        super()._decode(tokens)


def turns(chat: Chat, questions: int) -> list[tuple[int, int]]:
    """(tokens evaluated, tokens of the prompt) of each turn."""
    result = []
    for number in range(questions):
        before = chat.llm.evaluated
        "".join(chat.ask(f"Tell me about the {number}th of the hills, woods and fields there."))
        result.append((chat.llm.evaluated - before, chat.turn.prompt_tokens))
    return result


def test_a_full_context_is_read_again_once_in_many_turns(model):
    said = []
    llm = Counting(model, n_ctx=256, n_batch=64, threads=1)
    chat = Chat(llm, "Be brief.", LIKELIEST, max_tokens=2, notice=said.append)
    read = turns(chat, 16)
    again = [tokens for tokens, prompt in read[1:] if tokens > 60]
    full = [line for line in said if "context full" in line]
    assert 1 <= len(again) == len(full) <= 4  # and not each turn from the first on
    assert all(prompt <= 128 for tokens, prompt in read[1:] if tokens > 60)  # half of the context
    assert chat._prompt(0)[0].count("Be brief.") == 1
    assert re.fullmatch(r"\[context full: the oldest \d+ of \d+ turns forgotten\]", full[0])


def test_a_turn_reads_only_what_is_new(model):
    """At a high temperature the text of an answer is seldom cut into tokens as it was written."""
    llm = Counting(model, n_ctx=2048, n_batch=256, threads=1)
    wild = Sampling(temperature=100, top_k=0, top_p=1, min_p=0, seed=1)
    chat = Chat(llm, "", wild, max_tokens=40, notice=lambda line: None)
    assert all(tokens < 40 + 40 for tokens, _ in turns(chat, 3)[1:])
    whole = llm.tokenize(chat._prompt(0)[0].encode(), add_bos=False, special=True)
    assert llm.input_ids[: llm.n_tokens].tolist() != whole[: llm.n_tokens]


def test_undo_and_another_answer_read_little_again(model):
    """The K/V of a long conversation are given back, and a checkpoint brings them back."""
    llm = Counting(model, n_ctx=2048, n_batch=256, threads=1, checkpoint_step=64)
    chat = Chat(llm, "", LIKELIEST, max_tokens=100, notice=lambda line: None)
    turns(chat, 4)
    history, before = list(chat.history), llm.evaluated
    assert llm.n_tokens > llm.kv_kept > 0
    answer = "".join(chat.ask_again())
    assert chat.history == history and answer == history[-1]["content"]
    assert llm.evaluated - before <= 100 + 64
    assert chat.undo() == history[-2]["content"] and chat.undo() == history[-4]["content"]
    assert chat.history == history[:4]
    before = llm.evaluated
    answer = "".join(chat.ask("And the sea?"))
    assert llm.evaluated - before <= 20 + 100 + 64
    fresh = Chat(
        MoDLlama(model, n_ctx=2048, n_batch=256, threads=1), "", LIKELIEST, 100, chat.notice
    )
    turns_before = [message["content"] for message in history[0:4:2]]
    for question in turns_before:
        "".join(fresh.ask(question))
    assert "".join(fresh.ask("And the sea?")) == answer
    chat.reset()
    with pytest.raises(UserError, match="no question to take back"):
        chat.undo()


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


def test_figures_before_any_token_and_where_saving_begins(talk):
    chat, _, _ = talk
    kept = chat.llm.kv_kept
    assert kept == chat.llm.sink_tokens + chat.llm.kv_window + chat.llm.kv_rollback
    assert chat.status().endswith(f"(100%, saving begins after {kept} tokens)]")
    chat.max_tokens = 1
    "".join(chat.ask("word " * (kept - chat.llm.n_tokens)))
    assert chat.llm.n_tokens > kept
    assert re.search(r"\(\d\d%\)\]$", chat.status())
    chat.reset()
    assert "nan" not in chat.stats() and "activation: no tokens were read yet" in chat.stats()
    assert "(none yet, saving" in chat.stats()
