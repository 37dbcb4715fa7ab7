"""Both models answer RULER's samples, and a row for each task says how often they are right.

    records = [answer(pair, sample) for sample in samples]
    rows = by_task(records)           # [{"task": "vt", "length": 4096, "dense": 0.4}]

The context is read before the question, so that what a model drops of it is decided before the
question is known.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from mod_export.common.journal import Journal
from mod_export.evaluation.generation import greedy
from mod_export.evaluation.readers import Pair, Reader, Usage
from mod_export.evaluation.ruler.tasks import Sample
from mod_export.formats.gguf import GGUFFile

logger = logging.getLogger(__name__)

MODELS = ("dense", "mod")


def answer_all(
    pair: Pair,
    samples: Sequence[Sample],
    progress: Callable = iter,
    keep: str | Path | None = None,
) -> list[dict]:
    """The records of `answer` for all samples.

    keep: a file beside which the answers are kept, in `keep.partial`. What is there is not asked
    again. Raises UserError where answers of other models or samples are there.
    """
    if keep is None or not samples:
        return [answer(pair, sample) for sample in progress(samples)]
    with Journal(keep, _identity(pair, samples)) as journal:
        try:
            for number, sample in enumerate(progress(samples[journal.count :]), journal.count):
                journal.add({"id": number} | answer(pair, sample))
        except (KeyboardInterrupt, SystemExit):
            if journal.count:
                logger.info(
                    f"{journal.count} answers are kept in {journal.path}; the same command goes on "
                    "from there"
                )
            raise
        return [json.loads(line) for line in journal.lines()]


def forget(keep: str | Path) -> None:
    """Remove the answers that are kept beside a file."""
    Journal.path_of(keep).unlink(missing_ok=True)


def _identity(pair: Pair, samples: Sequence[Sample]) -> dict:
    """All that decides the answers, to tell whether those that are kept belong to this run."""
    prompts = hashlib.sha256()
    for sample in samples:
        prompts.update(json.dumps([sample.context, sample.question, list(sample.answers)]).encode())
    return {
        "models": {name: _model(reader) for name, reader in pair.readers().items()},
        "tasks": list(dict.fromkeys(sample.task for sample in samples)),
        "lengths": list(dict.fromkeys(sample.length for sample in samples)),
        "samples": max(sample.number for sample in samples) + 1,
        "prompts": prompts.hexdigest()[:32],
    }


def _model(reader: Reader) -> list:
    """A model's name, its setting, and what tells it from another of the same name."""
    path = Path(reader.name)
    state = (
        GGUFFile.open(path).digest()
        if path.is_file()
        else max((file.stat().st_mtime_ns for file in path.glob("*")), default=0)
    )
    beside = [GGUFFile.open(reader.routers).digest()] if reader.routers else []
    return [reader.name, reader.force, reader.shift, state, *beside]


def answer(pair: Pair, sample: Sample) -> dict:
    """What each model says, as a record of JSON.

    Keys: task, length, number, answers (the right ones), dense and mod (text and score), usage (of
    the measured model when it has read the context).
    """
    usage = Usage()
    said = {
        name: _ask(reader, sample, usage if reader is pair.measured else Usage())
        for name, reader in pair.readers().items()
    }
    return {
        "task": sample.task,
        "length": sample.length,
        "number": sample.number,
        "answers": list(sample.answers),
        **{name: {"text": text, "score": sample.score(text)} for name, text in said.items()},
        "usage": asdict(usage),
    }


def _ask(reader: Reader, sample: Sample, usage: Usage) -> str:
    """A model's answer. It ends where it has all that counts: the rest would change no score."""
    reader.reset()
    reader.last(sample.context)
    usage.add(reader)
    row = reader.last(sample.question)
    return greedy(reader, row, sample.n_answer, lambda text: sample.score(text) == 1)


def by_task(records: Sequence[dict]) -> list[dict]:
    """A row for each task and length, and for each length with several tasks a row `mean`.

    The keys are task, length, samples, dense, mod, their standard errors (dense_stderr,
    mod_stderr), activation and kv_share. Without a MoD model `mod` and the keys of usage are None.
    """
    rows = []
    for length in dict.fromkeys(record["length"] for record in records):
        mine = [record for record in records if record["length"] == length]
        tasks = [
            _row(task, [record for record in mine if record["task"] == task])
            for task in dict.fromkeys(record["task"] for record in mine)
        ]
        rows += tasks + ([_mean(tasks)] if len(tasks) > 1 else [])
    return rows


def _row(task: str, records: list[dict]) -> dict:
    row = {"task": task, "length": records[0]["length"], "samples": len(records)}
    for name in MODELS:
        scores = [record[name]["score"] for record in records if name in record]
        row[name], row[f"{name}_stderr"] = _share(scores)
    if row["mod"] is None:
        return row | dict.fromkeys(("activation", "kv_share"))
    usages = [record["usage"] for record in records]
    total = Usage(**{key: sum(usage[key] for usage in usages) for key in usages[0]})
    return row | total.shares()


def _share(scores: list[float]) -> tuple[float | None, float | None]:
    """The mean, and its standard error where there are several scores."""
    if not scores:
        return None, None
    n = len(scores)
    mean = sum(scores) / n
    spread = sum((score - mean) ** 2 for score in scores)
    return mean, math.sqrt(spread / (n - 1) / n) if n > 1 else None


def _mean(rows: list[dict]) -> dict:
    """The mean of the tasks of one length, each with the same weight, as RULER has it."""
    row = {
        "task": "mean",
        "length": rows[0]["length"],
        "samples": sum(row["samples"] for row in rows),
    }
    for key in (*MODELS, "activation", "kv_share"):
        values = [row[key] for row in rows]
        row[key] = None if None in values else sum(values) / len(values)
    for name in MODELS:
        errors = [row[f"{name}_stderr"] for row in rows]
        row[f"{name}_stderr"] = (
            None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(errors)
        )
    return row
