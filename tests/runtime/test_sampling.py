"""Sampling is one thing at every door: chat, generated data, and llama_cpp.Llama."""

import inspect
import json

import llama_cpp
import pytest

from mod_export.runtime.llama import MoDLlama
from mod_export.runtime.sampling import Sampling
from mod_export.serving.chat import Chat
from tests.support.tiny_gguf import Tiny

TEMPLATE = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
TOKENS = 24


def tiny(path, **recommended):
    shape = {"n_layer": 3, "n_embd": 64, "n_ff": 64, "vocab": True, "template": TEMPLATE}
    return Tiny(**shape, sampling=recommended).write(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("sampling") / "plain.gguf")


def chat(llm: MoDLlama, **chosen) -> str:
    sampling = Sampling.of(llm, **chosen)
    return "".join(Chat(llm, "", sampling, TOKENS, notice=lambda line: None).ask("ab"))


def test_the_defaults_are_those_of_llama_cpp():
    theirs = inspect.signature(llama_cpp.Llama.generate).parameters
    for name in ("top_p", "top_k", "min_p", "repeat_penalty", "frequency_penalty"):
        assert getattr(Sampling(), name) == theirs[name].default
    assert (Sampling().temperature, Sampling().seed) == (theirs["temp"].default, -1)


def test_what_a_file_recommends_comes_after_what_is_chosen(tmp_path, caplog):
    file = tiny(tmp_path / "own.gguf", temp=0.5, top_k=7, top_p=-1, mirostat=1, min_p=float("nan"))
    llm = MoDLlama(file, n_ctx=256, threads=1)
    assert Sampling.of(llm) == Sampling(temperature=0.5, top_k=7)
    assert Sampling.of(llm, temperature=0.0, top_k=None) == Sampling(temperature=0, top_k=7)
    for word in ("top_p = -1", "mirostat = 1", "min_p = nan"):
        assert sum(word in record.message for record in caplog.records) == 1  # not each time


def test_seeds(plain):
    llm = MoDLlama(plain, n_ctx=256, threads=1)
    hot = {"temperature": 1.5}
    assert chat(llm, **hot, seed=1) == chat(llm, **hot, seed=1) != chat(llm, **hot, seed=2)
    assert len({chat(llm, **hot, seed=-1) for _ in range(3)} | {chat(llm, **hot)}) == 4


def test_seeds_of_llama_cpp_hold(plain):
    def text(**options) -> str:
        llm = MoDLlama(plain, n_ctx=256, threads=1)
        return llm("ab", max_tokens=TOKENS, temperature=1.5, **options)["choices"][0]["text"]

    assert text(seed=3) == text(seed=3) != text(seed=4)
    assert text(seed=-1) != text(seed=-1)
    assert text() == text()  # as docs/how-to/chat-and-serve.md says


def test_the_chat_follows_the_file(plain, tmp_path):
    likeliest = chat(MoDLlama(plain, n_ctx=256, threads=1), temperature=0)
    llm = MoDLlama(tiny(tmp_path / "own.gguf", temp=0), n_ctx=256, threads=1)
    assert chat(llm) == likeliest != chat(llm, temperature=1.5)
    # Logits over so small a temperature overflow.
    assert chat(llm, temperature=1e-38, top_p=1, min_p=0) == likeliest


def test_the_commands_draw_as_they_are_told(plain, tmp_path, run_cli):
    """And generated data are the same each time, unless another seed is asked for."""

    def answer(*options) -> str:
        done = run_cli("chat", plain, "--prompt", "ab", "--max-tokens", TOKENS, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def data(*options) -> list[str]:
        out = tmp_path / "out.jsonl"
        files = ("generate-data", plain, "-o", out, "--force", "--ctx", 256)
        done = run_cli(*files, "--max-tokens", TOKENS, "--count", 3, *options)
        assert done.returncode == 0, done.stderr
        return [json.dumps(json.loads(line)) for line in out.read_text().splitlines()]

    assert answer("--seed", 5) == answer("--seed", 5) != answer()
    assert answer("--temperature", 0) == answer("--top-k", 1) == answer("--min-p", 1)
    assert answer("--seed", -1) != answer("--seed", -1)
    assert data() == data() != data("--seed", 5)  # -1 may draw one that ends no text in time
    assert run_cli("chat", plain, "--prompt", "ab", "--seed", -2).returncode == 2
