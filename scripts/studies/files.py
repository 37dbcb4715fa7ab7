"""How fast are files beside each other on one library? They run in turns.

    python -m scripts.studies.files layer.gguf head.gguf dense.gguf --context 512 --context 8192

The way is that of scripts/studies/builds.py. Ratios are against the first file: the median of the
ratios of all rounds.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import click

from mod_export.common.system import cpu_name
from mod_export.common.tables import format_table
from scripts.studies.builds import measure


@click.command()
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--starts", default=4, show_default=True, help="Starts of the processes.")
@click.option("--rounds", default=3, show_default=True, help="Turns of each file in a start.")
@click.option("--context", "contexts", multiple=True, default=[512], help="Tokens of the prompt.")
def main(files, starts, rounds, contexts):
    """Print a table: milliseconds of a token of each file, and ratios."""
    rows = []
    for context in contexts:
        found = measure({file.name: (file, None) for file in files}, context, starts, rounds)
        for what, ms in found.items():
            first = ms[files[0].name]
            for name, values in ms.items():
                ratio = statistics.median(b / a for a, b in zip(first, values, strict=True))
                rows.append([context, what, name, statistics.median(values), f"{ratio:.3f}"])
    print(f"{cpu_name()}, medians of {starts} starts with {rounds} rounds each")
    head = ["context", "", "file", "ms", f"/ {files[0].name}"]
    print(format_table(head, rows, markdown=True))


if __name__ == "__main__":
    main()
