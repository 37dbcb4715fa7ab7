"""Compare ways to calibrate, and the result with plain baselines: the figures of
docs/log.md.

    T="--text wiki=wiki.txt --text book=book.txt --out study"
    python scripts/calibration_study.py scores $T               # every score and fit, one activation
    python scripts/calibration_study.py table $T                # the chosen ones and baselines, several activations
    python scripts/calibration_study.py shapes $T-shapes --layers 1-29   # windows and layers of kv
    python scripts/calibration_study.py passkey --haystack long.txt --mod mod --out study
    python scripts/calibration_study.py report --out study      # tables and plots from the rows

Every finished row goes to a .jsonl file in the folder at once; rows that are there are not computed
again.
"""

import sys
from pathlib import Path

import click

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

TARGETS = "0.9,0.7,0.5,0.35"


@click.group()
def study():
    """Compare ways to calibrate a Mixture-of-Depths model."""


def options(command):
    for option in (
        click.option("--model", default="smollm2", show_default=True),
        click.option(
            "--out", required=True, type=click.Path(path_type=Path), help="Folder of the results."
        ),
        click.option(
            "--text",
            "texts",
            multiple=True,
            required=True,
            metavar="NAME=FILE",
            help="To judge by.",
        ),
        click.option(
            "--length", default=1024, show_default=True, help="Tokens in a sequence to judge by."
        ),
        click.option("--count", default=1, show_default=True, help="Sequences of each text."),
        click.option(
            "--sequences",
            default=8,
            show_default=True,
            help="Calibration sequences of 1024 tokens.",
        ),
        click.option("--kinds", default="kv,attn,ffn,block", show_default=True),
        click.option("--layers", default="auto", show_default=True),
        click.option("--sinks", default=4, show_default=True),
        click.option("--kv-window", default=64, show_default=True),
        click.option("--threads", default=2, show_default=True),
    ):
        command = option(command)
    return command


@study.command()
@options
@click.option("--target", default=0.5, show_default=True)
def scores(target, **given):
    """Compare scores and fits of each kind at one activation."""
    from study.stages import Study, compare_scores

    made = Study(**given)
    for kind in made.kinds:
        compare_scores(made, kind, target)


@study.command()
@options
@click.option("--targets", default=TARGETS, show_default=True)
@click.option("--name", default="table", show_default=True, help="Rows go to NAME.jsonl.")
def table(targets, name, **given):
    """The default score of each kind, and baselines, at several activations."""
    from study.stages import Study, compare_targets

    made = Study(**given)
    for kind in made.kinds:
        compare_targets(made, kind, [float(target) for target in targets.split(",")], name)


@study.command()
@options
@click.option("--windows", default="16,32,64,128,256", show_default=True)
@click.option(
    "--layer-sets", default="auto;1-29;3-28", show_default=True, help="Separated by semicolons."
)
@click.option("--target", default=0.35, show_default=True)
def shapes(windows, layer_sets, target, **given):
    """Windows and layers of kv units at equal K/V; --layers must cover all sets. Use a folder of
    its own.
    """
    from study.stages import DEFAULT_SCORES, Study, compare_shapes

    made = Study(**given | {"kinds": "kv"}, only=[DEFAULT_SCORES["kv"]])
    compare_shapes(
        made, [int(window) for window in windows.split(",")], layer_sets.split(";"), target
    )


@study.command()
@click.option("--mod", required=True, type=click.Path(), help="MoD directory.")
@click.option("--haystack", required=True, type=click.Path())
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--lengths", default="1024,2048,4096", show_default=True)
@click.option("--keys", default=2, show_default=True, help="Keys at each of the five depths.")
@click.option("--threads", default=2, show_default=True)
def passkey(mod, haystack, out, lengths, keys, threads):
    """Passkey retrieval of a MoD directory and of its dense base."""
    from study.stages import passkeys

    passkeys(mod, haystack, out, [int(length) for length in lengths.split(",")], keys, threads)


@study.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the rows.")
@click.option(
    "--docs",
    type=click.Path(path_type=Path),
    help="Where the pictures go; default: the same folder.",
)
def report(out, docs):
    """Tables (study.md, study.json) and pictures from the rows."""
    from study.report import write

    write(out, docs or out)


if __name__ == "__main__":
    study()
