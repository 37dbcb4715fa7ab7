"""What processes that measure a model share: tokens to feed, memory of the process, lines of JSON
as answers.
"""

import contextlib
import json
import os
from collections.abc import Callable

import numpy as np

from mod_export.errors import UserError


def prompt_tokens(llm, text: str, n: int, seq: int = 0, batch: int = 1) -> list[int]:
    """n tokens of sequence `seq` of `batch`: the text from another place for each, repeated where
    it is too short.

    A file without a vocabulary gets uniformly random tokens, the same in each run: its routers are
    made for them.
    """
    if not llm.has_vocab:
        return np.random.default_rng(seq).integers(0, llm.n_vocab(), n).tolist()
    tokens = llm.tokenize(text.encode())
    if not tokens:
        raise UserError("the text has no tokens", "give a longer --text")
    first = seq * len(tokens) // batch
    return ((tokens[first:] + tokens[:first]) * -(-n // len(tokens)))[:n]


def resident(name: str) -> int:
    """A memory figure of this process in bytes. VmHWM: largest resident memory, the mapped model
    file included.
    """
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(f"{name}:"))


def available_memory() -> int:
    """Bytes that can be taken without swapping, a tenth left over."""
    with open("/proc/meminfo") as f:
        return (
            next(int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
            * 1024
            * 9
            // 10
        )


def forget_peak() -> None:
    """Lets VmHWM begin anew, from what is resident now."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def answers() -> Callable[[dict], None]:
    """A function that writes a JSON line to stdout. llama.cpp and Python may print: what they print
    goes to stderr.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda line: print(json.dumps(line), file=out, flush=True)
