"""How fast is one build of the library against another? Both run the same files in turns.

    python -m scripts.studies.builds OLD NEW kv.gguf ffn.gguf --context 512

OLD and NEW are directories of libraries, as `mod-export build` prints them. Each build has a
process for each file. The processes read the same prompts and decode the same tokens, one after
the other, in alternating order. Two processes of the same build differ by up to 5 %, depending on
where the system puts their memory, so they are started anew several times. The ratio is the median
of the ratios of all rounds, and below 1 the new build is faster.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path

import click

from mod_export.benchmark.processes import Worker
from mod_export.benchmark.worker import VariantSetup
from mod_export.common.system import cpu_name
from mod_export.common.tables import format_table
from mod_export.data.text import default_texts

STEPS = 33  # The first step of a turn is not timed.
CHUNK = 512
PHASES = ("prefill", "decode")


# A file, and the directory of the library that runs it; None is the installed one.
Variant = tuple[Path, Path | None]


def measure(
    variants: dict[str, Variant], context: int, starts: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """What -> name -> milliseconds of a token, in each round of each start."""
    found: dict[str, dict] = {what: {name: [] for name in variants} for what in PHASES}
    for _ in range(starts):
        for what, ms in measure_once(variants, context, rounds).items():
            for name, values in ms.items():
                found[what][name] += values
    return found


def measure_once(
    variants: dict[str, Variant], context: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """The same of one start."""
    text = "\n\n".join(default_texts())
    workers = {}
    for name, (file, lib) in variants.items():
        setup = VariantSetup(
            file=str(file), text=text, context=context, tail=STEPS + 1, chunk=CHUNK
        )
        workers[name] = Worker(name, asdict(setup), lib)
    found: dict[str, dict] = {what: {name: [] for name in variants} for what in PHASES}
    try:
        for i in range(rounds + 1):
            for name in list(variants)[:: 1 if i % 2 else -1]:
                worker = workers[name]
                worker.ask(do="clear")
                turns = [
                    worker.ask(do="prefill", seq=0, start=at, n=min(CHUNK, context - at))
                    for at in range(0, context, CHUNK)
                ]
                decoded = worker.ask(do="decode", start=0, n=STEPS)
                if i:  # The first round warms up.
                    found["prefill"][name].append(sum(sum(t["ms"]) for t in turns) / context)
                    found["decode"][name].append(statistics.median(decoded["ms"]))
    finally:
        for worker in workers.values():
            worker.close()
    return found


@click.command()
@click.argument("old", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--starts", default=8, show_default=True, help="Starts of the processes.")
@click.option("--rounds", default=3, show_default=True, help="Turns of each build in a start.")
@click.option("--context", default=512, show_default=True, help="Tokens of the prompt.")
def main(old, new, files, starts, rounds, context):
    """Print a table: milliseconds of a token with both builds, and their ratio."""
    rows = []
    for file in files:
        variants = {"old": (file, old), "new": (file, new)}
        for what, ms in measure(variants, context, starts, rounds).items():
            ratio = statistics.median(b / a for a, b in zip(ms["old"], ms["new"], strict=True))
            middle = {name: statistics.median(values) for name, values in ms.items()}
            rows.append([file.name, what, middle["old"], middle["new"], f"{ratio:.3f}"])
    print(f"{cpu_name()}, context {context}, medians of {starts} starts with {rounds} rounds each")
    print(format_table(["file", "", "old ms", "new ms", "new / old"], rows, markdown=True))


if __name__ == "__main__":
    main()
