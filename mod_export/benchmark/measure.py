"""Measures variants that take turns: a chunk of the prompt in prefill, a few tokens in decode.

Example:

    runs = measure(team, ["ceiling", "mod"], step, 0.0, rounds=12, seconds=10, progress=Progress())
    runs["decode"]["mod"].ms                   # [repeats, turns]
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from mod_export.benchmark.processes import Team
from mod_export.common.progress import Progress

MIN_CHUNK_TOKENS = 512  # A prefill's turn has at least this many tokens, and at least an ubatch.
# Steps of a decode's turn. The first is not timed, because it brings the weights back into the
# caches.
TURN_STEPS = 8
MAX_TURNS_FACTOR = 8  # where turns are short: at most so many times the turns that were asked for
# Steps that are decoded before the tail is taken back, so that all of them happen at one context.
# At most kv_rollback.
TAIL_STEPS = 64
# Tokens of context at which attention takes about as long as everything else.
ATTENTION_HALF_TOKENS = 4000


@dataclass(frozen=True)
class Step:
    """What a set of processes is started for; types: ggml types of K and V."""

    context: int
    batch: int = 1
    ubatch: int = 512
    flash_attn: bool = True
    kv_type: str = "f16"
    types: tuple[int, int] = (1, 1)

    @property
    def chunk(self) -> int:
        """Tokens of a prefill's turn."""
        return max(MIN_CHUNK_TOKENS, self.ubatch)

    @property
    def label(self) -> str:
        """The step in words."""
        sequences = f" x {self.batch}" if self.batch > 1 else ""
        label = f"context {self.context}{sequences}, K/V {self.kv_type}, ubatch {self.ubatch}"
        return label if self.flash_attn else label + ", no flash attention"


@dataclass
class Run:
    """One variant's measurements of a phase.

    ms, activation: [repeats, turns]. perf: sums of the runtime's counters. units: kind -> [active,
    seen]. kv, rss_peak, vram (None without a GPU): bytes at the end of the phase.
    """

    ms: np.ndarray
    activation: np.ndarray
    perf: Counter = field(default_factory=Counter)
    units: dict[str, np.ndarray] = field(default_factory=dict)
    sample_ms: list[float] = field(default_factory=list)
    kv: dict = field(default_factory=dict)
    rss_peak: int = 0
    vram: int | None = None

    @classmethod
    def of(cls, answers: list[list[dict]]) -> "Run":
        """The run of a process's answers, [repeats][turns]."""
        run = cls(
            ms=np.array([[sum(answer["ms"]) for answer in turns] for turns in answers]),
            activation=np.array([[answer["activation"] for answer in turns] for turns in answers]),
        )
        for turns in answers:
            for answer in turns:
                run.perf.update(answer["perf"])
                for kind, counts in answer["units"].items():
                    run.units[kind] = run.units.get(kind, 0) + np.array(counts)
                if "sample_ms" in answer:
                    run.sample_ms.append(answer["sample_ms"])
        return run


def join(parts: list[dict[str, dict[str, Run]]]) -> dict[str, dict[str, Run]]:
    """Measurements of one step by processes that were started anew, as one measurement.

    Their repeats stand one after the other.
    """
    return {
        phase: {name: _join([part[phase][name] for part in parts]) for name in runs}
        for phase, runs in parts[0].items()
    }


def _join(runs: list[Run]) -> Run:
    last = runs[-1]
    units = runs[0].units
    perf: Counter = Counter()
    for run in runs:
        perf.update(run.perf)  # a sum of counters would leave out zeros
    return Run(
        np.concatenate([run.ms for run in runs]),
        np.concatenate([run.activation for run in runs]),
        perf,
        {kind: sum(run.units[kind] for run in runs) for kind in units},
        [ms for run in runs for ms in run.sample_ms],
        last.kv,
        max(run.rss_peak for run in runs),
        last.vram,
    )


def measure(
    team: Team,
    names: list[str],
    step: Step,
    shift: float,
    rounds: int,
    seconds: float,
    progress: Progress,
) -> dict[str, dict[str, Run]]:
    """phase -> variant -> its run.

    Each variant has `rounds` turns in prefill and three times as many in decode. It has more where
    turns are short, and so noisier: a phase takes at least `seconds`, or MAX_TURNS_FACTOR times the
    turns.
    """
    warm_up(team, names, step, shift)
    return {
        "prefill": _prefill(team, names, step, shift, (rounds, seconds), progress),
        "decode": _decode(team, names, step, (3 * rounds, seconds), progress),
    }


def warm_up(team: Team, names: list[str], step: Step, shift: float) -> None:
    """Bring weights, code and compute buffers into memory, by one turn that does not count."""
    team.ask_all(names, do="clear", shift=shift)
    team.ask_all(names, do="prefill", seq=0, start=0, n=min(step.context, step.chunk))


def _prefill(
    team: Team, names: list[str], step: Step, shift: float, least: tuple, progress: Progress
) -> dict:
    chunks = [
        (seq, start, min(step.chunk, step.context - start))
        for seq in range(step.batch)
        for start in range(0, step.context, step.chunk)
    ]

    def begin() -> None:
        team.ask_all(names, do="clear", shift=shift)

    def turn(name: str, i: int) -> dict:
        seq, start, n = chunks[i]
        return team.ask(name, do="prefill", seq=seq, start=start, n=n)

    # The work of a chunk grows with the context before it.
    weights = [n * (1 + start / ATTENTION_HALF_TOKENS) for _, start, n in chunks]
    return _take_turns(team, names, least, weights, begin, turn, progress, f"{step.label}: prefill")


def _decode(team: Team, names: list[str], step: Step, least: tuple, progress: Progress) -> dict:
    n = TAIL_STEPS // TURN_STEPS

    def begin() -> None:
        team.ask_all(names, do="rewind")

    def turn(name: str, i: int) -> dict:
        return team.ask(name, do="decode", start=i * TURN_STEPS, n=TURN_STEPS)

    return _take_turns(
        team, names, least, [1.0] * n, begin, turn, progress, f"{step.label}: decode"
    )


def _take_turns(
    team: Team,
    names: list[str],
    least: tuple[int, float],
    weights: list[float],
    begin: Callable,
    turn: Callable,
    progress: Progress,
    label: str,
) -> dict[str, Run]:
    """Repeat until there are enough turns.

    least: the number of turns, and the seconds that they take. The first repeat tells how many
    repeats that is. weights: how long each turn of a repeat takes, in any unit.
    """
    started = time.monotonic()
    answers = [_repeat(names, begin, turn, progress.count(label, range(len(weights)), weights))]
    fewest = math.ceil(least[0] / len(weights))
    repeats = max(
        fewest, min(math.ceil(least[1] / (time.monotonic() - started)), MAX_TURNS_FACTOR * fewest)
    )
    rest = progress.count(
        label, range(len(weights), repeats * len(weights)), weights * (repeats - 1)
    )
    for _ in range(1, repeats):
        answers.append(_repeat(names, begin, turn, islice(rest, len(weights))))
    rest.close()
    runs = {
        name: Run.of([[turns[name] for turns in repeat] for repeat in answers]) for name in names
    }
    for name, run in runs.items():
        state = team.ask(name, do="state")
        run.kv, run.rss_peak, run.vram = state["kv"], state["rss_peak"], state.get("vram")
    return runs


def _repeat(names: list[str], begin: Callable, turn: Callable, turns: Iterable[int]) -> list[dict]:
    """Each turn by every variant, in another order each time; a list of variant -> answer."""
    begin()
    answers = []
    for i, number in enumerate(turns):
        first = number % len(names)
        answers.append({name: turn(name, i) for name in names[first:] + names[:first]})
    return answers
