"""Open many damaged files, each in a process of its own, and tell how that ended.

    python -m tests.support.mutation_run --count 10000 --seed 1

Processes are forked from one that has imported everything but torch. Each inspects a file, opens
it, tokenizes, chats and generates. The files are tiny models, and now and then SmolLM2's first
layers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mod_export.errors import UserError
from mod_export.export import write_routers
from mod_export.formats.gguf import GGUFFile
from mod_export.inspection import inspect, render
from mod_export.runtime import MoDLlama
from mod_export.runtime.templates import ChatTemplate, has_template
from tests.support import mod_files, mutated_gguf, tiny_vocab

LIMIT_SECONDS = 60
LIMIT_BYTES = 16 << 30
TEXT = "Hello the low w\u00f6rld \U0001f600\n\t 1234 <tool></s> in"
ASSERTED = "or llama.cpp has a fault"  # the error of a failed assertion says so
SMOLLM2 = "smollm2"
SMOLLM2_EVERY = 51  # of the mutations one is of SmolLM2, of each kind in turn
LORA = "lora"  # an adapter for the first of the tiny models
LORA_EVERY = 23
FINE, REFUSED, FAULT = "accepted", "refused", "FAULT"


@dataclass(frozen=True)
class Outcome:
    """How a use of a file ended, and what was said."""

    result: str
    words: str = ""


def use(path: Path) -> str:
    """Do with a file what commands do. Raises UserError where the file is refused."""
    with contextlib.suppress(UserError):
        render(inspect(path))
    llm = MoDLlama(path, n_ctx=64, n_batch=32, threads=1)
    tokens = [1, 2, 3]
    if llm.has_vocab:
        for special in (False, True):
            tokens = llm.tokenize(TEXT.encode(), special=special)
        if has_template(llm):
            with contextlib.suppress(UserError):
                template = ChatTemplate.of(llm)
                template.render([{"role": "user", "content": "Hello"}])
    llm.eval(tokens[:40] or [1])
    for token in range(min(llm.n_vocab(), 5)) if llm.has_vocab else ():
        llm.piece(token, special=True), llm.token_text(token), llm.is_end(token)
    for token, _ in zip(llm.generate((tokens or [1])[:20], temp=0.8), range(3), strict=False):
        if llm.has_vocab:
            llm.piece(token), llm.detokenize([token])
    if llm.has_vocab:
        llm(TEXT[:20], max_tokens=2)
    llm.last_logits(), llm.description, llm.kv(), llm.stats()
    llm.close()
    return ""


def use_lora(base: Path, path: Path) -> str:
    """Generate with a LoRA adapter. Raises UserError where the adapter is refused."""
    llm = MoDLlama(base, n_ctx=64, n_batch=32, threads=1, lora_path=str(path))
    llm("the low", max_tokens=2)
    llm.close()
    return ""


def outcome(call: Callable[[], str], limit: float = LIMIT_SECONDS) -> Outcome:
    """Run `call` in a forked process, and tell how that ended."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            os.close(reader)
            os.dup2(stderr.fileno(), 2)
            os.dup2(stderr.fileno(), 1)
            _run_child(call, writer)
        os.close(writer)
        ready, _, _ = select.select([reader], [], [], limit)
        said = b""
        while ready and (block := os.read(reader, 1 << 16)):
            said += block
        os.close(reader)
        if not ready:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        stderr.seek(0)
        tail = stderr.read()[-1500:].decode("utf-8", "replace")
    if not ready:
        return Outcome(FAULT, f"hang: {tail}")
    if os.WIFSIGNALED(status):
        return Outcome(FAULT, f"{signal.Signals(os.WTERMSIG(status)).name}: {tail}")
    result, _, words = said.decode("utf-8", "replace").partition("\n")
    return Outcome(result or FAULT, words)


def _run_child(call: Callable[[], str], writer: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = f"{FINE}\n{call()}"
    except UserError as exc:
        answer = f"{REFUSED}\n{exc}"
    except BaseException:
        answer = f"{FAULT}\n{traceback.format_exc()[-1500:]}"
    os.write(writer, answer.encode("utf-8", "replace"))
    os._exit(0)


@dataclass
class Case:
    """One mutation."""

    model: str
    kind: str
    seed: int


def cases(count: int, seed: int, models: Sequence[str] = ()) -> list[Case]:
    """Return `count` mutations: all kinds in turn, and the tiny models or `models` in turn."""
    kinds = list(mutated_gguf.KINDS)
    names = models or list(tiny_vocab.MODELS)
    made = []
    for number in range(count):
        name = names[number // len(kinds) % len(names)]
        kind = kinds[number % len(kinds)]
        if number % SMOLLM2_EVERY == 0 and not models:
            name = SMOLLM2
        elif number % LORA_EVERY == 0 and not models and kind not in mutated_gguf.OF_VOCABULARY:
            name = LORA
        made.append(Case(name, kind, seed + number))
    return made


def write(path: Path, name: str) -> Path:
    """Write the model of this name."""
    if name == LORA:
        tiny_vocab.MODELS["bpe"]().lora(path)
        return path
    if name != SMOLLM2:
        return tiny_vocab.write(path, name)
    base = path.with_suffix(".base")
    assert outcome(partial(_write_smollm2, base)) == Outcome(FINE)
    config = mod_files.config({"kv": [1]}, n_layer=2)
    weight = np.random.default_rng(0).standard_normal(576, np.float32)
    write_routers(GGUFFile.open(base), path, config, {(1, "kv"): (weight, np.zeros(1, np.float32))})
    return path


def _write_smollm2(path: Path) -> str:
    # This import brings torch, without which a fork takes a third of the time.
    from tests.support.short_smollm2 import short_smollm2

    short_smollm2(path, n_layer=2)
    return ""


def run(todo: list[Case], folder: Path) -> Iterator[tuple[Case, Outcome]]:
    """Yield (case, outcome) of each mutation. `folder` holds the files while they are tried."""
    os.environ["GGML_NO_BACKTRACE"] = "1"  # gdb writes it, and takes seconds
    originals = {
        name: write(folder / f"{name}.gguf", name).read_bytes()
        for name in {case.model for case in todo}
    }
    uses = dict.fromkeys(originals, use)
    uses[LORA] = partial(use_lora, write(folder / "base.gguf", "bpe"))
    for name in originals:  # in this process, which has imported everything when it forks
        uses[name](folder / f"{name}.gguf")
    for case in todo:
        path = folder / "mutated.gguf"
        path.write_bytes(mutated_gguf.mutate(originals[case.model], case.kind, case.seed))
        yield case, outcome(partial(uses[case.model], path))


def table(counts: Counter) -> str:
    """Return accepted, refused and faults of each kind of mutation."""
    lines = [f"{'mutation':<28} {FINE:>9} {REFUSED:>9} {FAULT:>9}"]
    for kind in dict.fromkeys(kind for kind, _ in counts):
        row = [counts[kind, result] for result in (FINE, REFUSED, FAULT)]
        lines.append(f"{kind:<28} {row[0]:>9} {row[1]:>9} {row[2]:>9}")
    sums = [sum(n for (_, r), n in counts.items() if r == x) for x in (FINE, REFUSED, FAULT)]
    lines.append(f"{'all':<28} {sums[0]:>9} {sums[1]:>9} {sums[2]:>9}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=[*tiny_vocab.MODELS, SMOLLM2, LORA], action="append")
    parser.add_argument("--kind", choices=mutated_gguf.KINDS)
    parser.add_argument("--assertions", action="store_true", help="print failed assertions")
    parser.add_argument("--json", action="store_true", help="print a line for each mutation")
    options = parser.parse_args()
    counts: Counter = Counter()
    start = time.time()
    todo = cases(options.count, options.seed, options.model or ())
    with tempfile.TemporaryDirectory() as folder:
        chosen = [case for case in todo if options.kind in (None, case.kind)]
        for case, found in run(chosen, Path(folder)):
            counts[case.kind, found.result] += 1
            if options.json:
                print(json.dumps([case.kind, str(case), found.result, found.words]), flush=True)
            elif found.result == FAULT or ASSERTED in found.words and options.assertions:
                print(f"{case}: {found.words}\n", flush=True)
    if not options.json:
        print(table(counts))
    print(f"{time.time() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
