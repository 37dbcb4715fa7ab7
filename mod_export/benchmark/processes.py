"""Processes that measure a model, and the protocol of JSON lines that they speak.

Each request is one line on the process's stdin, a JSON object. The answer is one line on its
stdout; lines {"progress": ...} may come before. The first request makes the process's object. Later
requests call its methods: {"do": "prefill", "seq": 0, ...}. An error is a line {"error": ...,
"cure": ...}.

    with Worker("ceiling", setup) as worker:             # this end
        worker.ask(do="prefill", seq=0, start=0, n=512)

    if __name__ == "__main__":                           # the process's end
        serve(Variant.from_setup)
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mod_export.common.text import last_words
from mod_export.errors import UserError

DEFAULT_CURE = "is there enough memory? try fewer --variants or a smaller context"


class Worker:
    """A process that answers one question at a time.

    name: what errors call the process, without a name `the measuring process`. setup: the first
    request, whose answer becomes `about`. lib: directory of the library that the process loads, by
    default the installed one. module: what the process runs. cure: for a process that dies. env:
    its environment, by default that of this process.
    """

    def __init__(
        self,
        name: str,
        setup: dict,
        lib: Path | None = None,
        module: str = "mod_export.benchmark.worker",
        cure: str = DEFAULT_CURE,
        env: dict[str, str] | None = None,
    ):
        self.name = name
        self.cure = cure
        self.words = tempfile.TemporaryFile()  # what the process says; told where it dies
        env = dict(os.environ if env is None else env)
        if lib:
            env |= {"LLAMA_CPP_LIB_PATH": str(lib), "LD_LIBRARY_PATH": library_path(lib)}
        # The worker has its own session. Ctrl-C reaches this process alone, which ends the worker.
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            env=env,
            text=True,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
        )
        try:
            self.about = self.ask(**setup)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def ask(self, on_progress: Callable[[Any], None] | None = None, **question) -> dict:
        """The process's answer; on_progress gets the values that it reports before.

        Raises UserError with what went wrong in the process.
        """
        line = self._exchange(json.dumps(question))
        while True:
            if not line:
                who = f"the process of {self.name}" if self.name else "the measuring process"
                code = self.process.wait()
                self.words.seek(0)
                said = last_words(self.words.read().decode("utf-8", "replace"))
                raise UserError(
                    f"{who} ended with code {code}{f': {said}' if said else ''}", self.cure
                )
            answer = json.loads(line)
            if "error" in answer:
                start = f"{self.name}: " if self.name else ""
                raise UserError(f"{start}{answer['error']}", answer["cure"])
            if "progress" not in answer:
                return answer
            if on_progress:
                on_progress(answer["progress"])
            line = self.process.stdout.readline()

    def _exchange(self, request: str) -> str:
        """The first line of the answer; empty where the process has ended."""
        try:
            print(request, file=self.process.stdin, flush=True)
            return self.process.stdout.readline()
        except BrokenPipeError:
            return ""

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # a question that was never read
            self.process.stdin.close()
        self.process.stdout.close()
        self.words.close()


def library_path(lib: Path) -> str:
    """LD_LIBRARY_PATH with `lib` first, so that the libraries of two builds are not mixed.

    The user's own path stays behind `lib`: a GPU's driver may be found through it alone.
    """
    return os.pathsep.join(filter(None, [str(lib), os.environ.get("LD_LIBRARY_PATH")]))


class Team:
    """The processes of some variants, all at the same settings."""

    def __init__(self, setups: dict[str, tuple[dict, Path | None]]):
        self.workers: dict[str, Worker] = {}
        try:
            for name, (setup, lib) in setups.items():
                self.workers[name] = Worker(name, setup, lib)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        return list(self.workers)

    def ask(self, name: str, **question) -> dict:
        """The answer of one variant's process."""
        return self.workers[name].ask(**question)

    def ask_all(self, names: Iterable[str], **question) -> dict[str, dict]:
        """The answers of several variants' processes, which work one after the other."""
        return {name: self.workers[name].ask(**question) for name in names}

    def close(self) -> None:
        """End all the processes."""
        for worker in self.workers.values():
            worker.close()


def serve(make: Callable[..., Any]) -> None:
    """The process's end: answer requests until stdin closes.

    make(**setup) gives the object that answers, whose describe() is the first answer. A method that
    yields reports progress. With layers on a GPU each answer also has `vram`, the bytes of GPU
    memory that this process has taken so far.
    """
    answer = _answer_channel()
    try:
        setup = json.loads(sys.stdin.readline())
        during, vram = _gpu_meter(setup.get("gpu_layers", 0))
        worker = during(make, **setup)
        answer(worker.describe() | vram())
        for line in sys.stdin:
            command = json.loads(line)
            method = getattr(worker, command.pop("do"))
            if inspect.isgeneratorfunction(method):
                method = _reporting(method, answer)
            answer(during(method, **command) | vram())
    except UserError as exc:
        answer({"error": exc.message, "cure": exc.cure})
    except Exception as exc:  # a bug, whose one line is all that the user sees of this process
        answer({"error": f"{type(exc).__name__}: {exc}", "cure": ""})


def _answer_channel() -> Callable[[dict], None]:
    """A function that writes a JSON line to stdout.

    What llama.cpp and Python print from now on goes to stderr.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda line: print(json.dumps(line), file=out, flush=True)


def _reporting(method: Callable, answer: Callable[[dict], None]) -> Callable[..., dict]:
    """A generator method as a function: what it yields is progress, what it returns the result."""

    def run(**arguments) -> dict:
        steps = method(**arguments)
        while True:
            try:
                answer({"progress": next(steps)})
            except StopIteration as end:
                return end.value

    return run


def _gpu_meter(gpu_layers: int) -> tuple[Callable, Callable[[], dict]]:
    """A function that calls another, and one that tells what such calls have taken.

    The second gives {"vram": bytes}, and {} without layers on a GPU.
    """
    if not gpu_layers:
        return lambda function, **kwargs: function(**kwargs), dict
    from mod_export.runtime.devices import GpuMemoryMeter

    meter = GpuMemoryMeter()
    return meter.during, lambda: {"vram": meter.used}


def prompt_tokens(llm, text: str, n: int, seq: int = 0, batch: int = 1) -> list[int]:
    """n tokens for sequence `seq` of `batch` sequences.

    Each sequence begins at another place of the text, which is repeated where it is too short. A
    file without a vocabulary gets uniformly random tokens, the same in each run: its routers are
    made for them.
    """
    if not llm.has_vocab:
        return np.random.default_rng(seq).integers(0, llm.n_vocab(), n).tolist()
    tokens = llm.tokenize(text.encode())
    if not tokens:
        raise UserError("the text has no tokens", "give a longer --text")
    first = seq * len(tokens) // batch
    repeats = -(-n // len(tokens))
    return ((tokens[first:] + tokens[:first]) * repeats)[:n]
