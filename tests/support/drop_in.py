"""Calls of every public name of llama_cpp.Llama, run in a process of their own.

    outcomes = run_calls("ours", "dense.gguf")      # or "theirs": llama_cpp.Llama itself
    outcomes["right"]["tokenize"]                   # what the right calls returned
    outcomes["wrong"]["tokenize", 0]                # how a wrong call ended

A process that a signal ends names the call that it was in.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

PROMPT = "The lighthouse stands on a rock and"
OTHER = "One two three four five"
N_CTX = 256
OPTIONS = {"n_ctx": N_CTX, "n_batch": 128, "n_threads": 1, "flash_attn": True, "verbose": False}
POOLINGS = {"none": 0, "mean": 1, "cls": 2, "last": 3}
MESSAGES = [{"role": "user", "content": "Name a colour."}]
GREEDY = {"temperature": 0.0, "max_tokens": 6}
YES_OR_NO = 'root ::= "yes" | "no"'
HALF_PAIR = "half a pair \ud800"
MILLION = 1_000_000


class Objects:
    """The objects of one class and one file that the calls use, made when they are asked for."""

    def __init__(self, cls: type, path: str):
        self.cls, self.path = cls, path

    def open(self, **options):
        return self.cls(model_path=self.path, **{**OPTIONS, **options})

    @functools.cached_property
    def llm(self):
        return self.open()

    @functools.cached_property
    def all(self):
        """An object with the logits of all tokens."""
        return self.open(logits_all=True)

    @functools.cache  # noqa: B019  one object for each process
    def embedder(self, pooling: str = "mean"):
        return self.open(embedding=True, pooling_type=POOLINGS[pooling])


# --- right calls: name -> functions of Objects, whose results can be compared


def plain(value):
    """The value without what differs from call to call, as JSON has it."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ("id", "created", "model")}
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, str | int | float | None):
        return value
    return [plain(item) for item in value]


def taken(llm, prompt: str, n: int = 6, **options) -> list[int]:
    """The first n tokens of a generation; without options the likeliest ones."""
    steps = llm.generate(llm.tokenize(prompt.encode()), **(options or {"temp": 0.0}))
    return [token for token, _ in zip(steps, range(n), strict=False)]


def evaluated(llm, prompt: str = PROMPT):
    llm.reset()
    llm.eval(llm.tokenize(prompt.encode()))
    return llm


def grammar(text: str = YES_OR_NO):
    import llama_cpp

    return llama_cpp.LlamaGrammar.from_string(text, verbose=False)


def only(token: int) -> Callable:
    """A logits processor that allows one token."""

    def process(_ids, logits):
        changed = np.full_like(logits, -np.inf)
        changed[token] = 0
        return changed

    return process


def processors(*functions):
    import llama_cpp

    return llama_cpp.LogitsProcessorList(functions)


def until(n: int):
    """Stopping criteria that end at n tokens."""
    import llama_cpp

    return llama_cpp.StoppingCriteriaList([lambda ids, _logits: len(ids) >= n])


def cached(llm) -> list:
    import llama_cpp

    llm.set_cache(llama_cpp.LlamaRAMCache())
    try:
        return [llm(PROMPT, **GREEDY), llm(OTHER, **GREEDY), llm(PROMPT, **GREEDY)]
    finally:
        llm.set_cache(None)


def restored(llm) -> list[int]:
    evaluated(llm)
    state = llm.save_state()
    evaluated(llm, OTHER)
    llm.load_state(state)
    return [llm.n_tokens, *taken(llm, PROMPT)]


def seeded(llm, seed: int) -> list[int]:
    llm.set_seed(seed)
    return taken(llm, PROMPT, temp=1.5, top_p=1.0)


def copied(llm) -> list[int]:
    import pickle

    other = pickle.loads(pickle.dumps(llm))
    try:
        return [other.n_ctx(), *taken(other, PROMPT)]
    finally:
        other.close()


def restarted(llm, path: str) -> list:
    other = type(llm).__new__(type(llm))
    other.__setstate__(llm.__getstate__())
    try:
        return [Path(other.model_path) == Path(path), *taken(other, PROMPT)]
    finally:
        other.close()


def closed(objects: Objects) -> list[str]:
    llm = objects.open()
    llm.close()
    llm.close()
    return []


RIGHT: dict[str, list[Callable[[Objects], object]]] = {
    "__call__": [
        lambda o: o.llm(PROMPT, **GREEDY),
        lambda o: o.llm(PROMPT, **GREEDY, echo=True),
        lambda o: o.llm(o.llm.tokenize(PROMPT.encode()), **GREEDY),
        lambda o: o.llm(PROMPT, temperature=1.2, max_tokens=6, seed=7),
        lambda o: o.llm(PROMPT, temperature=0.0, max_tokens=40, stop=["\n", " the"]),
        lambda o: list(o.llm(PROMPT, **GREEDY, stream=True)),
        lambda o: o.llm("Is it? ", **GREEDY, grammar=grammar()),
        lambda o: o.llm(PROMPT, **GREEDY, logit_bias={100: 100.0}),
        lambda o: o.llm(PROMPT, **GREEDY, logits_processor=processors(only(77))),
        lambda o: o.llm(PROMPT, temperature=0.0, mirostat_mode=2, max_tokens=4),
    ],
    "close": [closed],
    "create_chat_completion": [
        lambda o: o.llm.create_chat_completion(MESSAGES, **GREEDY),
        lambda o: list(o.llm.create_chat_completion(MESSAGES, **GREEDY, stream=True)),
        lambda o: o.llm.create_chat_completion(
            MESSAGES, **GREEDY, response_format={"type": "json_object"}
        ),
        lambda o: o.all.create_chat_completion(MESSAGES, **GREEDY, logprobs=True, top_logprobs=2),
    ],
    "create_chat_completion_openai_v1": [],  # the package openai is no part of the project
    "create_completion": [
        lambda o: o.llm.create_completion(PROMPT, **GREEDY),
        lambda o: o.llm.create_completion(PROMPT, temperature=0.0, max_tokens=-1, stop="."),
        lambda o: o.llm.create_completion("x " * (N_CTX - 9), temperature=0.0, max_tokens=None),
        lambda o: o.all.create_completion(PROMPT, **GREEDY, logprobs=2),
        lambda o: o.all.create_completion(PROMPT, **GREEDY, logprobs=2, echo=True),
        lambda o: list(o.all.create_completion(PROMPT, **GREEDY, logprobs=2, stream=True)),
        lambda o: o.llm.create_completion(PROMPT, **GREEDY, stopping_criteria=until(10)),
    ],
    "create_embedding": [
        lambda o: o.embedder().create_embedding("Hello"),
        lambda o: o.embedder().create_embedding(["Hello", "a lighthouse"]),
    ],
    "ctx": [lambda o: o.llm.ctx is not None],
    "detokenize": [
        lambda o: o.llm.detokenize(o.llm.tokenize(PROMPT.encode())),
        lambda o: o.llm.detokenize([1, 2, 300, 20], special=True),
        lambda o: o.llm.detokenize([300, 20], prev_tokens=[1]),
        lambda o: o.llm.detokenize([]),
    ],
    "embed": [
        lambda o: o.embedder().embed("Hello world"),
        lambda o: o.embedder("none").embed("Hello world"),
        lambda o: o.embedder("cls").embed("Hello world", normalize=True),
        lambda o: o.embedder("last").embed(["Hello", "a lighthouse"], return_count=True),
        lambda o: o.embedder().embed("word " * 300),
    ],
    "eval": [lambda o: evaluated(o.all).scores[: o.all.n_tokens].argmax(-1)],
    "eval_logits": [lambda o: np.argmax(list(evaluated(o.all).eval_logits), -1)],
    "eval_tokens": [lambda o: evaluated(o.llm).eval_tokens],
    "from_pretrained": [],  # see test_a_file_of_the_hub
    "generate": [
        lambda o: taken(o.llm, PROMPT),
        lambda o: taken(o.llm, PROMPT, temp=0.0, stopping_criteria=until(9)),
        lambda o: taken(o.llm, "Is it? ", 3, temp=0.0, grammar=grammar()),
        lambda o: taken(evaluated(o.llm), OTHER, temp=0.0, reset=False),
    ],
    "load_state": [lambda o: restored(o.llm)],
    "logits_to_logprobs": [lambda o: o.cls.logits_to_logprobs(np.arange(4, dtype=np.single))],
    "longest_token_prefix": [lambda o: o.cls.longest_token_prefix([1, 2, 3], [1, 2, 4])],
    "model": [lambda o: o.llm.model is not None],
    "n_ctx": [lambda o: o.llm.n_ctx()],
    "n_embd": [lambda o: o.llm.n_embd()],
    "n_vocab": [lambda o: o.llm.n_vocab()],
    "pooling_type": [lambda o: o.embedder("cls").pooling_type()],
    "reset": [lambda o: (evaluated(o.llm).reset(), o.llm.n_tokens)],
    "sample": [
        lambda o: evaluated(o.llm).sample(temp=0.0),
        lambda o: evaluated(o.all).sample(temp=0.0, idx=2),
    ],
    "save_state": [lambda o: evaluated(o.llm).save_state().n_tokens],
    "set_cache": [lambda o: cached(o.llm)],
    "set_seed": [lambda o: (seeded(o.llm, 5), seeded(o.llm, 5), seeded(o.llm, 6))],
    "token_bos": [lambda o: o.llm.token_bos()],
    "token_eos": [lambda o: o.llm.token_eos()],
    "token_nl": [lambda o: o.llm.token_nl()],
    "tokenize": [
        lambda o: o.llm.tokenize(PROMPT.encode()),
        lambda o: o.llm.tokenize(b"<|im_end|>", special=True),
        lambda o: o.llm.tokenize(b"", add_bos=False),
        lambda o: o.llm.tokenize(b"\xff\xfe and \x00 bytes"),
        lambda o: o.llm.tokenize(b"<|im_end|>", False, False),
    ],
    "tokenizer": [
        lambda o: o.llm.tokenizer().encode("Hello"),
        lambda o: o.llm.tokenizer().decode([300, 20]),
    ],
    "__getstate__": [lambda o: copied(o.llm)],
    "__setstate__": [lambda o: restarted(o.llm, o.path)],
}

# --- wrong calls: each is to raise a UserError


def consume(iterator):
    for _ in iterator:
        pass


WRONG: dict[str, list[Callable[[Objects], object]]] = {
    "__call__": [
        lambda o: o.llm(""),
        lambda o: o.llm([]),
        lambda o: o.llm([MILLION]),
        lambda o: o.llm([-1]),
        lambda o: o.llm([1.5]),
        lambda o: o.llm(None),
        lambda o: o.llm(5),
        lambda o: o.llm(b"bytes"),
        lambda o: o.llm(HALF_PAIR),
        lambda o: o.llm(PROMPT, temperature=float("nan")),
        lambda o: o.llm(PROMPT, temperature="warm"),
        lambda o: o.llm(PROMPT, top_p=float("inf")),
        lambda o: o.llm(PROMPT, top_k="a"),
        lambda o: o.llm(PROMPT, repeat_penalty=0.0),
        lambda o: o.llm(PROMPT, max_tokens="many"),
        lambda o: o.llm(PROMPT, seed="seed"),
        lambda o: o.llm(PROMPT, stop=[5]),
        lambda o: o.llm(PROMPT, stop=5),
        lambda o: o.llm(PROMPT, logit_bias={MILLION: 1.0}),
        lambda o: o.llm(PROMPT, logit_bias={-1: 1.0}),
        lambda o: o.llm(PROMPT, logit_bias={"a": 1.0}),
        lambda o: o.llm(PROMPT, grammar="root ::= yes"),
        lambda o: o.llm(PROMPT, grammar=grammar("this is no grammar")),
        lambda o: o.llm(PROMPT, grammar=grammar(YES_OR_NO), logits_processor=[only(77)]),
        lambda o: o.llm(PROMPT, logits_processor=[lambda _ids, logits: logits[:5]]),
        lambda o: o.llm(PROMPT, logits_processor=[lambda _ids, logits: logits * np.nan]),
        lambda o: o.llm(PROMPT, logits_processor=5),
        lambda o: o.llm(PROMPT, stopping_criteria=[5]),
        lambda o: consume(o.llm("", stream=True)),
        lambda o: consume(o.llm([MILLION], stream=True)),
    ],
    "close": [],
    "create_chat_completion": [
        lambda o: o.llm.create_chat_completion("Hello"),
        lambda o: o.llm.create_chat_completion(None),
        lambda o: o.llm.create_chat_completion([{"content": "no role"}]),
        lambda o: o.llm.create_chat_completion([{"role": "user", "content": HALF_PAIR}]),
        lambda o: o.llm.create_chat_completion([{"role": "user", "content": "long " * N_CTX}]),
        lambda o: o.llm.create_chat_completion(MESSAGES, logprobs=True, top_logprobs=2),
        lambda o: o.llm.create_chat_completion(MESSAGES, temperature=float("nan")),
        lambda o: o.open(chat_format="no such").create_chat_completion(MESSAGES),
    ],
    "create_chat_completion_openai_v1": [],
    "create_completion": [
        lambda o: o.llm.create_completion("x " * N_CTX),
        lambda o: o.llm.create_completion([5] * N_CTX),
        lambda o: o.llm.create_completion(PROMPT, logprobs=2),
        lambda o: o.all.create_completion(PROMPT, logprobs=-2),
        lambda o: o.llm.create_completion([1, 2], echo=True),
        lambda o: o.llm.create_completion(PROMPT, suffix=" in the sea."),
        lambda o: consume(o.llm.create_completion("x " * N_CTX, stream=True)),
    ],
    "create_embedding": [
        lambda o: o.llm.create_embedding("not opened for embeddings"),
        lambda o: o.embedder().create_embedding(["Hello", ""]),
    ],
    "ctx": [],
    "detokenize": [
        lambda o: o.llm.detokenize([MILLION]),
        lambda o: o.llm.detokenize([-1]),
        lambda o: o.llm.detokenize(["a"]),
        lambda o: o.llm.detokenize(5),
        lambda o: o.llm.detokenize([1 << 70]),
    ],
    "embed": [
        lambda o: o.llm.embed("not opened for embeddings"),
        lambda o: o.embedder().embed(""),
        lambda o: o.embedder("none").embed(["Hello", ""]),
        lambda o: o.embedder().embed(5),
        lambda o: o.embedder().embed([5]),
        lambda o: o.embedder().embed(HALF_PAIR),
        lambda o: o.embedder().embed("word " * 300, truncate=False),
    ],
    "eval": [
        lambda o: o.llm.eval([MILLION]),
        lambda o: o.llm.eval([-1]),
        lambda o: o.llm.eval([1 << 40]),
        lambda o: o.llm.eval("text"),
        lambda o: o.llm.eval(None),
        lambda o: o.llm.eval([1] * (N_CTX + 1)),
    ],
    "eval_logits": [],
    "eval_tokens": [],
    "from_pretrained": [lambda o: o.cls.from_pretrained("no such/org/name", "*.gguf")],
    "generate": [
        lambda o: next(o.llm.generate([])),
        lambda o: next(o.llm.generate([MILLION])),
        lambda o: next(o.llm.generate(["a"])),
        lambda o: next(o.llm.generate([1] * (N_CTX + 1))),
        lambda o: next(o.llm.generate([1], temp=float("nan"))),
        lambda o: next(o.llm.generate([1], grammar=grammar("root ::= (("))),
        lambda o: sent(o.llm, [MILLION]),
        lambda o: sent(o.llm, [5, 6, 7]),  # whose logits nobody has kept
    ],
    "load_state": [lambda o: o.llm.load_state(5), lambda o: o.llm.load_state(None)],
    "logits_to_logprobs": [],
    "longest_token_prefix": [],
    "model": [],
    "n_ctx": [],
    "n_embd": [],
    "n_vocab": [],
    "pooling_type": [],
    "reset": [],
    "sample": [
        lambda o: (o.llm.reset(), o.llm.sample()),
        lambda o: evaluated(o.llm).sample(temp=0.0, idx=0),
        lambda o: evaluated(o.llm).sample(idx=MILLION),
        lambda o: evaluated(o.llm).sample(temp=float("nan")),
        lambda o: (restored(o.llm), o.llm.load_state(o.llm.save_state()), o.llm.sample()),
    ],
    "save_state": [],
    "set_cache": [lambda o: o.llm.set_cache(5)],
    "set_seed": [lambda o: o.llm.set_seed("a"), lambda o: o.llm.set_seed(None)],
    "token_bos": [],
    "token_eos": [],
    "token_nl": [],
    "tokenize": [
        lambda o: o.llm.tokenize("a str"),
        lambda o: o.llm.tokenize(None),
        lambda o: o.llm.tokenize([1]),
    ],
    "tokenizer": [
        lambda o: o.llm.tokenizer().detokenize([MILLION]),
        lambda o: o.llm.tokenizer().decode([-5]),
        lambda o: o.llm.tokenizer_.detokenize([MILLION]),
        lambda o: o.llm.tokenizer().tokenize("a str"),
    ],
    "__getstate__": [],
    "__setstate__": [],
    # What MoDLlama adds.
    "__init__": [
        lambda o: o.open(path="another.gguf"),
        lambda o: o.open(threads=2),
        lambda o: o.cls(),
        lambda o: o.open(n_ctx=-1),
        lambda o: o.open(n_batch=0),
        lambda o: o.open(n_ubatch=0),
        lambda o: o.open(n_threads_batch=-1),
        lambda o: o.open(n_threads_batch=5000),
        lambda o: o.open(type_k=99),
        lambda o: o.open(pooling_type=99),
        lambda o: o.open(rope_scaling_type=99),
        lambda o: o.open(kv_overrides={"a": [1]}),
        lambda o: o.open(lora_path="none.gguf"),
        lambda o: o.open(lora_path=o.path),
        lambda o: o.open(tensor_split=["a"]),
        lambda o: o.open(vocab_only=True).eval([1]),
        lambda o: o.open(rope_freq_base=float("nan")).sample(),
        lambda o: o.open(checkpoints=-1),
        lambda o: o.open(checkpoint_step=0),
    ],
    "piece": [lambda o: o.llm.piece(MILLION), lambda o: o.llm.piece("a")],
    "is_end": [lambda o: o.llm.is_end(MILLION)],
    "is_control": [lambda o: o.llm.is_control(MILLION), lambda o: o.llm.is_control(-1)],
    "decode_rows": [
        lambda o: o.llm.decode_rows([(MILLION, 0, 0, True)]),
        lambda o: o.llm.decode_rows([(1, 0, 5, True)]),
        lambda o: o.llm.decode_rows([(1, 0, -1, True)]),
        lambda o: o.llm.decode_rows([]),
        lambda o: o.llm.decode_rows([(1, i, 0, False) for i in range(OPTIONS["n_batch"] + 1)]),
    ],
    "remove_tail": [lambda o: o.llm.remove_tail(7), lambda o: o.llm.remove_tail(-1)],
    "set_threshold": [
        lambda o: o.llm.set_threshold(999, 0.5),
        lambda o: o.llm.set_threshold(0, "a"),
        lambda o: o.llm.set_threshold("a", 0.5),
    ],
    "set_shift": [lambda o: o.llm.set_shift("a"), lambda o: o.llm.set_shift(float("nan"))],
    "force": [lambda o: setattr(o.llm, "force", "never"), lambda o: setattr(o.llm, "force", [])],
    "kv": [lambda o: o.llm.kv(999), lambda o: o.llm.kv("a")],
    "new_context": [
        lambda o: o.llm.new_context(no_such_parameter=1),
        lambda o: o.llm.new_context(type_k=8, type_v=8, flash_attn_type=0),
        lambda o: o.llm.new_context(n_ctx="a"),
        lambda o: o.llm.new_context(n_batch=0),
    ],
}


def sent(llm, ids: list[int]) -> None:
    steps = llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0)
    next(steps)
    steps.send(ids)
    next(steps)


# --- the process


def main(which: str, path: str) -> None:
    """Print an outcome of each call as a line of JSON, and before it the name of the call."""
    import llama_cpp

    from mod_export.errors import UserError
    from mod_export.runtime import MoDLlama

    objects = Objects(MoDLlama if which == "ours" else llama_cpp.Llama, path)

    def say(**line):
        print(json.dumps(line), flush=True)

    for name, calls in RIGHT.items():
        for index, call in enumerate(calls):
            say(call=["right", name, index])
            try:
                say(right=plain(call(objects)))
            except Exception as exc:
                say(right={"error": f"{type(exc).__name__}: {exc}"})
    if which == "theirs":
        return
    before = taken(objects.llm, PROMPT)
    for name, calls in WRONG.items():
        for index, call in enumerate(calls):
            say(call=["wrong", name, index])
            try:
                result = call(objects)
                outcome = f"returned {result!r:.80}"
            except UserError as exc:
                outcome = "UserError" if exc.cure else f"no cure: {exc}"
            except Exception as exc:
                outcome = f"{type(exc).__name__}: {exc}"
            if (after := taken(objects.llm, PROMPT)) != before:
                outcome += f"; afterwards it wrote {after}, before {before}"
            say(wrong=outcome)


def run_calls(which: str, path: Path) -> dict[str, dict]:
    """The outcomes of all calls. A signal is the outcome of the call that it ended."""
    command = [sys.executable, "-m", "tests.support.drop_in", which, path]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )
    outcomes: dict[str, dict] = {"right": {}, "wrong": {}}
    kind = name = index = None
    for line in done.stdout.splitlines():
        found = json.loads(line)
        if "call" in found:
            kind, name, index = found["call"]
            outcomes[kind][name, index] = f"ended the process: {done.returncode} {done.stderr}"
        else:
            outcomes[kind][name, index] = found[kind]
    return outcomes


if __name__ == "__main__":
    main(*sys.argv[1:])
