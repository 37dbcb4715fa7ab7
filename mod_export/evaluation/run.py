"""How much a Mixture-of-Depths model loses against its dense base.

It measures perplexity, KL, accuracy, passkeys and K/V. The base is the same weights with every unit
active, or another model.

    plan = EvaluationPlan(texts=["wiki.txt"], tasks=["tasks.jsonl"])
    result = evaluate("mod.gguf", plan)                   # what `mod-export eval` does

    model = MoDModel.load("mod")                          # the same on a model that is at hand
    loss(model, pack(model.tokenizer, text, 2048, count=4))   # Loss(perplexity=..., kl=..., ...)
    passkey(model, haystack_text, length=2048)            # {"mod": 0.9, "dense": 1.0, ...}
    accuracy(model, ["tasks.jsonl"], limit=50)            # [{"task": "piqa", "mod": {...}}, ...]
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mod_export import __version__
from mod_export.common.progress import Progress, stage
from mod_export.common.system import usable_cpus
from mod_export.data.text import pack, read_texts
from mod_export.errors import UserError
from mod_export.evaluation import passkey as passkeys
from mod_export.evaluation import perplexity, scoring
from mod_export.evaluation import tasks as task_files
from mod_export.evaluation.open import open_pair
from mod_export.evaluation.passkey import DEPTHS, LENGTHS
from mod_export.evaluation.perplexity import Loss
from mod_export.evaluation.readers import Pair, TorchReader, torch_pair
from mod_export.evaluation.ruler import answers as ruler_answers
from mod_export.evaluation.ruler import sources as ruler_sources
from mod_export.evaluation.ruler import tasks as ruler_tasks
from mod_export.formats.kv_types import KVTypes
from mod_export.model.mod_model import MoDModel

logger = logging.getLogger(__name__)

__all__ = [
    "EvaluationPlan",
    "Loss",
    "accuracy",
    "evaluate",
    "loss",
    "passkey",
]


LENGTH = 2048  # tokens of a sequence of text
MIN_LENGTH = 16


@dataclass(frozen=True)
class EvaluationPlan:
    """What to measure.

    texts: files for perplexity and KL. Each gives `count` sequences of `length` tokens, of which
    the first `skip` do not count, or all but the `last` ones. A text that is shorter gives fewer
    sequences, or one that is shorter. length: None is LENGTH, or the context of the models where
    that is less. tasks: JSONL files, see tasks.py. task_limit: items of each task. haystack: text
    for passkeys. passkey_lengths: tokens of the prompts, None for those of LENGTHS that fit the
    model. passkey_trials: prompts for each length and depth. ruler: names of RULER's tasks.
    ruler_lengths: tokens of prompt and answer, None for those of ruler.tasks.LENGTHS that fit the
    model. ruler_samples: prompts of each task and length. ruler_essays, ruler_squad,
    ruler_hotpotqa: files, see ruler.sources.read.
    """

    texts: Sequence[str] = ()
    length: int | None = None
    count: int = 4
    skip: int = 0
    last: int | None = None
    tasks: Sequence[str] = ()
    task_limit: int | None = None
    haystack: str | None = None
    passkey_lengths: Sequence[int] | None = None
    passkey_depths: Sequence[float] = DEPTHS
    passkey_trials: int = 2
    ruler: Sequence[str] = ()
    ruler_lengths: Sequence[int] | None = None
    ruler_samples: int = ruler_tasks.SAMPLE_COUNT
    ruler_seed: int = 0
    ruler_essays: str | None = None
    ruler_squad: str | None = None
    ruler_hotpotqa: str | None = None

    def __post_init__(self):
        if not (self.texts or self.tasks or self.haystack or self.ruler):
            raise UserError("nothing to measure", "give --text, --tasks, --passkey or --ruler")
        if self.skip and self.last:
            raise UserError("--skip and --last both say which tokens count", "give one of them")
        _check_skip(self.skip, self.length or LENGTH)

    def skipped(self, length: int) -> int:
        """How many first positions of a sequence of `length` tokens do not count."""
        return self.skip if self.last is None else max(0, length - 1 - self.last)


def _check_skip(skip: int, length: int, what: str = "") -> None:
    if not 0 <= skip < length - 1:
        raise UserError(
            f"{what}skipping {skip} of {length} tokens leaves none", "use a smaller --skip"
        )


def evaluate(
    target,
    plan: EvaluationPlan,
    dense=None,
    shift: float = 0.0,
    threads: int | None = None,
    device: str = "cpu",
    gpu_layers: int = 0,
    progress: Progress | None = None,
    done: Callable = lambda name, rows: None,
    keep: str | Path | None = None,
    types: KVTypes | None = None,
    dtype: str = "auto",
    mod: str | None = None,
    base: str | Path | None = None,
) -> dict:
    """Measure target beside dense; {"about", "texts", "tasks", "passkey", "ruler"} with rows each.

    The arguments up to gpu_layers, types, dtype, mod and base are those of open_pair. done: is
    called with the name and the rows of each part as soon as the part is measured. keep: a file
    beside which the answers to RULER are kept, so that a stopped run goes on; ruler.answers.forget
    removes them.
    docs/reference/result-files.md has the keys of a row. Raises UserError, before anything is
    measured, for what cannot be read or measured.
    """
    texts = {path: read_texts([path]) for path in plan.texts}
    items, skipped = task_files.read_tasks(plan.tasks, plan.task_limit)
    haystack = read_texts([plan.haystack]) if plan.haystack else None
    sources = ruler_sources.read(plan.ruler_essays, plan.ruler_squad, plan.ruler_hotpotqa)
    pair = open_pair(target, dense, shift, threads, device, gpu_layers, types, dtype, mod, base)
    stand_ins = ruler_tasks.stand_ins(sources, plan.ruler)
    about = _about(target, dense, shift, threads, plan, pair)
    about |= {"kv_type": str(types) if types else None, "mod": mod}
    about |= {"skipped_tasks": skipped, "ruler_stand_ins": stand_ins}
    for task, n in skipped.items():
        logger.warning(f"note: {n} items of {task} left out: they have no choices")
    for name, text in stand_ins.items():
        logger.warning(f"note: RULER's {name} are {text}")
    work = _Evaluation(pair, plan, texts, items, haystack, sources)
    pair.reserve(work.longest())
    result = {"about": about}
    for name, run in (
        ("texts", work.losses),
        ("tasks", work.accuracies),
        ("passkey", work.passkeys),
        ("ruler", lambda progress: work.ruler(progress, keep)),
    ):
        result[name] = run(progress or Progress())
        if result[name]:
            done(name, result[name])
    return result


class _Evaluation:
    """A plan as tokens, and its four parts."""

    def __init__(
        self,
        pair: Pair,
        plan: EvaluationPlan,
        texts: dict[str, str],
        items: list,
        haystack: str | None,
        sources: ruler_sources.Sources,
    ):
        self.pair, self.plan, tokenizer = pair, plan, pair.measured.tokenizer
        if (items or haystack is not None or plan.ruler) and any(
            reader.whole for reader in pair.readers().values()
        ):
            raise UserError(
                f"{pair.measured.name} chooses by top-k, which looks at later tokens: it cannot "
                "generate",
                "measure it on --text only",
            )
        n_ctx = min(reader.n_ctx for reader in pair.readers().values())
        length = plan.length or min(LENGTH, n_ctx)
        if plan.texts:
            pair.reserve(length)
        self.sequences = {
            path: _pack(tokenizer, path, text, length, plan) for path, text in texts.items()
        }
        self.items = [task_files.encode(tokenizer, item) for item in items]
        lengths = plan.passkey_lengths or [n for n in LENGTHS if n <= n_ctx] or [n_ctx]
        self.trials = (
            passkeys.make_trials(
                tokenizer, haystack, lengths, plan.passkey_depths, plan.passkey_trials
            )
            if haystack is not None
            else []
        )
        lengths = plan.ruler_lengths or [n for n in ruler_tasks.LENGTHS if n <= n_ctx] or [n_ctx]
        if plan.ruler:
            pair.reserve(max(lengths))
        with stage("making the prompts of RULER"):
            self.samples = ruler_tasks.make_samples(
                tokenizer, sources, plan.ruler, lengths, plan.ruler_samples, plan.ruler_seed
            )

    def longest(self) -> int:
        """Tokens of the longest sequence of all."""
        lengths = [ids.shape[1] for ids in self.sequences.values()] + [
            prompt.length for prompt in (*self.trials, *self.samples)
        ]
        return max(lengths + [len(ids) for item in self.items for ids in item.ids])

    def losses(self, progress: Progress) -> list[dict]:
        rows = []
        for path, ids in self.sequences.items():
            skip = self.plan.skipped(ids.shape[1])
            found = perplexity.loss(
                self.pair, ids, skip, lambda x, path=path: progress.count(path, x)
            )
            rows.append(
                {"text": path, "sequences": len(ids), "length": ids.shape[1], **asdict(found)}
            )
        return rows

    def accuracies(self, progress: Progress) -> list[dict]:
        weights = [float(item.n_tokens) for item in self.items]
        return scoring.accuracy(
            self.pair, self.items, lambda x: progress.count("tasks", x, weights)
        )

    def passkeys(self, progress: Progress) -> list[dict]:
        weights = [float(trial.length) for trial in self.trials]
        cells = passkeys.retrieve(
            self.pair, self.trials, lambda x: progress.count("passkeys", x, weights)
        )
        return passkeys.by_length(cells)

    def ruler(self, progress: Progress, keep: str | Path | None) -> list[dict]:
        records = ruler_answers.answer_all(
            self.pair,
            self.samples,
            lambda x: progress.count("RULER", x, [float(sample.length) for sample in x]),
            keep,
        )
        return ruler_answers.by_task(records)


def _pack(tokenizer, path: str, text: str, length: int, plan: EvaluationPlan) -> torch.Tensor:
    """Return sequences [n, T] of a text: as many and as long as wanted, or what is there."""
    try:
        ids = pack(tokenizer, text, length, plan.count, least=MIN_LENGTH)
    except UserError as exc:
        raise UserError(f"{path}: {exc.message}", exc.cure) from exc
    found, n_tokens = ids.shape
    if n_tokens < length:
        logger.warning(f"note: {path} has one sequence of {n_tokens} tokens, not {length}")
    elif found < plan.count:
        logger.warning(f"note: {path} has {found} of {plan.count} sequences of {length} tokens")
    _check_skip(plan.skipped(n_tokens), n_tokens, f"{path}: ")
    return ids


def _about(
    target, dense, shift: float, threads: int | None, plan: EvaluationPlan, pair: Pair
) -> dict:
    """What the figures hold for."""
    return {
        "command": shlex.join(["mod-export", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "target": str(target),
        "dense": str(dense) if dense else None,
        "shift": shift,
        "in": {
            name: type(reader).__name__.removesuffix("Reader").lower()
            for name, reader in pair.readers().items()
        },
        "dtype": {
            name: reader.dtype
            for name, reader in pair.readers().items()
            if isinstance(reader, TorchReader)
        },
        "threads": threads or usable_cpus(),
        "plan": asdict(plan),
    }


# --- on a model in torch


def loss(
    model: MoDModel, sequences: torch.Tensor, skip: int = 0, progress: Callable = iter
) -> Loss:
    """Compare `model` with its dense base on sequences [n, T].

    The first `skip` positions of each do not count.
    """
    return perplexity.loss(torch_pair(model), sequences, skip, progress)


def accuracy(
    model: MoDModel, paths: Sequence[str], limit: int | None = None, progress: Callable = iter
) -> list[dict]:
    """The rows of scoring.accuracy for task files, with `limit` items of each task."""
    items, _ = task_files.read_tasks(paths, limit)
    encoded = [task_files.encode(model.tokenizer, item) for item in items]
    return scoring.accuracy(torch_pair(model), encoded, progress)


def passkey(
    model: MoDModel,
    haystack: str,
    length: int,
    depths: Sequence[float] = DEPTHS,
    keys: int = 4,
    seed: int = 0,
    progress: Callable = iter,
) -> dict:
    """The row of passkey.by_length for prompts of `length` tokens, `keys` of them at each depth."""
    trials = passkeys.make_trials(model.tokenizer, haystack, [length], depths, keys, seed)
    (row,) = passkeys.by_length(passkeys.retrieve(torch_pair(model), trials, progress))
    return row
