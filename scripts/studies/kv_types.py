"""What types of K and V cost beside what forgetting costs: quality against bytes, and speed.

    python -m scripts.studies.kv_types dense.gguf half.gguf quarter.gguf --text a.txt \\
        --text b.txt --length 2048 --length 8192 --count 4 --out kv-types.jsonl \\
        --plot kv-types.png
    python -m scripts.studies.kv_types dense.gguf half.gguf quarter.gguf ... --speed

The first file is the dense one. It reads each text with K and V in f16, and every file with every
type is compared with that. Rows are kept as lines of JSON, so that a stopped run goes on, and the
same command with all rows there only writes the table and the plot. `--speed` measures times
instead: the types of a file and the dense model in f16 take turns in processes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import click

from mod_export.benchmark.measure import TAIL_STEPS, TURN_STEPS, Step, measure
from mod_export.benchmark.processes import Team
from mod_export.benchmark.rows import ratio, total
from mod_export.benchmark.worker import VariantSetup
from mod_export.cli.output import run_script, show_messages
from mod_export.common.progress import Progress
from mod_export.common.system import cpu_name
from mod_export.data.text import default_texts, pack, read_texts
from mod_export.errors import UserError
from mod_export.evaluation.perplexity import losses
from mod_export.evaluation.runtime_reader import RuntimeReader
from mod_export.formats.kv_types import KVTypes
from scripts.studies import kv_types_report, rows

TYPES = ("f16", "q8_0", "q8_0/q4_0", "q4_0")
REFERENCE = KVTypes()
QUALITY, SPEED = ("file", "kv_type", "length", "text"), ("file", "kv_type", "context")


class Rows:
    """The rows of one kind in a file of JSON lines, by the values of their keys."""

    def __init__(self, path: Path, keys: Sequence[str]):
        self.path, self.keys = path, keys
        path.parent.mkdir(parents=True, exist_ok=True)
        found = [row for row in rows.read(path) if all(key in row for key in keys)]
        self.done = {self._name(row): row for row in found}

    def _name(self, row: dict) -> tuple:
        return tuple(row[key] for key in self.keys)

    def missing(self, wanted: Sequence[tuple]) -> list[tuple]:
        """Those of the wanted names that have no row yet."""
        return [name for name in wanted if name not in self.done]

    def add(self, row: dict) -> None:
        """Keep a row."""
        rows.append(self.path, row)
        self.done[self._name(row)] = row


def measure_quality(
    files: Sequence[Path], types: Sequence[KVTypes], text: Path, length: int, count: int, kept: Rows
) -> None:
    """Add a row for each file and type that has none: what it loses on one text."""
    reference = RuntimeReader(files[0], types=REFERENCE)
    reference.reserve(length)
    ids = pack(reference.tokenizer, read_texts([text]), length, count, least=16)
    for file in files:
        names = [(file.name, str(kind), length, text.name) for kind in types]
        todo = [KVTypes.parse(name[1]) for name in kept.missing(names)]
        if not todo:
            continue
        readers = [RuntimeReader(file, types=kind) for kind in todo]
        for reader in readers:
            reader.reserve(length)
        used: list[list[int]] = [[] for _ in readers]

        def each(sequences, readers=readers, used=used, file=file) -> Iterator:
            label = f"{file.name}, {text.name}, {length} tokens"
            for sequence in Progress().count(label, sequences):
                yield sequence
                for sizes, reader in zip(used, readers, strict=True):
                    sizes.append(reader.llm.kv().used)

        _, *found = losses(reference, readers, ids, progress=each)
        for kind, loss, sizes, reader in zip(todo, found, used, readers, strict=True):
            row = {"file": file.name, "kv_type": str(kind), "length": length, "text": text.name}
            row |= {"sequences": len(ids), "kv_bytes": round(sum(sizes) / len(sizes))}
            kept.add(row | asdict(loss))
            reader.llm.close()
    reference.llm.close()


def measure_speed(
    files: Sequence[Path], types: Sequence[KVTypes], context: int, rounds: int, kept: Rows
) -> None:
    """Add a row for each file and type that has none: its times beside those of the dense model."""
    for file in files:
        names = [(file.name, str(kind), context) for kind in types]
        todo = [KVTypes.parse(name[1]) for name in kept.missing(names)]
        if not todo:
            continue
        variants = {"reference": _setup(files[0], REFERENCE, context)}
        variants |= {str(kind): _setup(file, kind, context) for kind in todo}
        step = Step(context, kv_type=f"{', '.join(map(str, todo))} of {file.name}")
        with Team(variants) as team:
            runs = measure(team, team.names, step, 0.0, rounds, 0.0, Progress())
        for kind in todo:
            row = {"file": file.name, "kv_type": str(kind), "context": context, "cpu": cpu_name()}
            for phase, parts in (("prefill", context), ("decode", 0)):
                run, beside = runs[phase][str(kind)], runs[phase]["reference"]
                n_tokens = parts or run.ms.shape[1] * (TURN_STEPS - 1)
                row[f"{phase}_ms"] = total(run.ms) / n_tokens
                row[phase] = ratio(run.ms, beside.ms)
            kept.add(row)


def _setup(file: Path, kind: KVTypes, context: int) -> tuple[dict, None]:
    text = "\n\n".join(default_texts())
    setup = VariantSetup(str(file), text, context, TAIL_STEPS, **kind.options())
    return asdict(setup), None


def _check(files: Sequence[Path]) -> None:
    reader = RuntimeReader(files[0])
    with closing(reader.llm):
        if reader.units:
            raise UserError(f"{files[0]} is a MoD file", "name the dense file first")
    if len({file.name for file in files}) < len(files):
        raise UserError("two files have one name", "give each a name of its own")


@click.command()
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option(
    "--text", "texts", multiple=True, type=click.Path(exists=True, path_type=Path), required=True
)
@click.option("--length", "lengths", multiple=True, default=[2048], help="Tokens of a sequence.")
@click.option("--count", default=4, show_default=True, help="Sequences of each text.")
@click.option("--types", multiple=True, default=TYPES, show_default=True, help="Types of K and V.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File of rows.")
@click.option("--speed", is_flag=True, help="Measure times at these lengths instead of quality.")
@click.option("--rounds", default=12, show_default=True, help="Turns of each type, of --speed.")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture to write: .png.")
def main(files, texts, lengths, count, types, out, speed, rounds, plot):
    """Measure what has no row yet, and print the tables as Markdown."""
    show_messages()
    _check(files)
    kinds = [KVTypes.parse(name) for name in types]
    quality, times = Rows(out, QUALITY), Rows(out, SPEED)
    for length in lengths:
        if speed:
            measure_speed(files, kinds, length, rounds, times)
            continue
        for text in texts:
            measure_quality(files, kinds, text, length, count, quality)
    names = [file.name for file in files]
    table = kv_types_report.points(quality.done.values(), times.done.values(), names)
    click.echo(kv_types_report.tables(table))
    if plot and table:
        kv_types_report.draw(table, plot)


if __name__ == "__main__":
    run_script(lambda: main(standalone_mode=False))
