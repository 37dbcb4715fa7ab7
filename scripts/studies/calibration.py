"""Compare ways to calibrate, and the result with plain baselines: the figures of docs/log.md.

    T="--text wiki=wiki.txt --text book=book.txt --out study"
    python -m scripts.studies.calibration scores $T
    python -m scripts.studies.calibration table $T
    python -m scripts.studies.calibration shapes $T-shapes --layers-routed 1-29
    python -m scripts.studies.calibration passkey --haystack long.txt --mod mod --out study
    python -m scripts.studies.calibration report --out study

`scores` compares every score and fit at one activation. `table` compares the chosen ones with
baselines at several activations. `shapes` compares windows and layers of kv. `report` makes tables
and plots from the rows.

Every finished row goes to a .jsonl file in the folder at once; rows that are there are not computed
again. The older figures of docs/log.md had a window of 64: add `--kv-window 64` for them.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import click
import torch

from mod_export.adapter import open_model
from mod_export.calibration.measuring import DEFAULT_SCORES
from mod_export.cli.output import show_messages
from mod_export.config import KV_WINDOW, SINK_TOKENS
from mod_export.data import text as data_text
from mod_export.evaluation import run as eval_run
from mod_export.model import architectures, loading
from mod_export.units import Unit, parse_kinds, parse_layers, routed_layers
from scripts.studies.judging import Judge
from scripts.studies.report import write_report
from scripts.studies.rows import NamedRows
from scripts.studies.samples import METHODS, Samples, collect, mean_cost, routers_of
from scripts.studies.scores import SCORES

logger = logging.getLogger(f"mod_export.{__name__}")  # the handler of mod_export prints it

TARGETS = "0.9,0.7,0.5,0.35"


class Study:
    """Hold model, samples and judge of one run of the script.

    The output folder caches samples per kind.
    """

    def __init__(
        self,
        model,
        out,
        texts,
        length,
        count,
        sequences,
        kinds,
        layers,
        sinks,
        kv_window,
        threads,
        only=None,
    ):
        torch.set_num_threads(threads)
        self.out, self.kinds, self.only = out, convert_kinds(kinds), only
        self.base, self.tokenizer = loading.load(model)
        self.layers = routed_layers(
            parse_layers(layers), len(architectures.decoder_layers(self.base)), "attn"
        )
        self.samples = self._samples(sequences, kv_window, sinks)
        pairs = [text.split("=", 1) for text in texts]
        packed = {
            n: data_text.pack(self.tokenizer, data_text.read_texts([p]), length, count)
            for n, p in pairs
        }
        self.judge = Judge(self.base, self.tokenizer, packed, sinks, kv_window)

    def _samples(self, sequences: int, kv_window: int, sinks: int) -> dict[str, Samples]:
        paths = {kind: self.out / f"samples-{kind}.pt" for kind in self.kinds}
        missing = {
            kind: list(self.only or SCORES[kind])
            for kind, path in paths.items()
            if not path.exists()
        }
        if missing:
            self.out.mkdir(parents=True, exist_ok=True)
            ids = data_text.pack(self.tokenizer, data_text.default_texts()[0], 1024)
            ids = ids[:: max(1, len(ids) // sequences)][:sequences]
            found = collect(self.base, self.tokenizer, ids, missing, self.layers, kv_window, sinks)
            for kind in missing:
                # torch.load takes plain tuples only
                of_kind = [
                    {tuple(unit): part[unit] for unit in part if unit.kind == kind}
                    for part in (found.x, found.cost)
                ]
                torch.save(of_kind, paths[kind])
        return {kind: read_samples(path) for kind, path in paths.items()}


def read_samples(path: Path) -> Samples:
    x, cost = ({Unit(*unit): value for unit, value in part.items()} for part in torch.load(path))
    return Samples(x, cost)


def convert_kinds(kinds: str) -> list[str]:
    return [parse_kinds(kind)[0] for kind in kinds.split(",")]


def compare_scores(study: Study, kind: str, target: float) -> None:
    """Compare all scores with ridge, the other fits of the best score, and plain baselines."""
    rows, samples = NamedRows(study.out / "scores.jsonl"), study.samples[kind]

    def add(score: str, method: str) -> dict:
        def make():
            routers = routers_of(samples, kind, score, method, target)
            return study.judge.routers(routers, target, per_layer="threshold" in method)

        more = {
            "kind": kind,
            "variant": "router",
            "score": score,
            "method": method,
            "target": target,
        }
        return rows.add(f"{kind} {score} {method} {target}", make, **more)

    made = [add(score, "ridge") for score in SCORES[kind]]
    best = min(made, key=lambda row: row["kl"])["score"]
    for method in METHODS[1:]:
        add(best, method)
    baselines(study, rows, kind, target)
    random_baseline(study, rows, kind, target)


def compare_targets(study: Study, kind: str, targets: list[float], name: str) -> None:
    """Compare the default score with baselines at several activations."""
    rows = NamedRows(study.out / f"{name}.jsonl")
    rows.add(
        "dense",
        lambda: study.judge.static("kv", [], study.layers, study.judge.kv_window),
        variant="dense",
    )
    for target in targets:

        def make(target=target):
            routers = routers_of(study.samples[kind], kind, DEFAULT_SCORES[kind], "ridge", target)
            return study.judge.routers(routers, target)

        rows.add(f"{kind} router {target}", make, kind=kind, variant="router", target=target)
    for baseline in (baselines, random_baseline):
        for target in targets:
            baseline(study, rows, kind, target)


def compare_shapes(study: Study, windows: list[int], layer_sets: list[str], target: float) -> None:
    """Judge kv with other windows and other layers, at equal K/V bytes.

    The K/V bytes are those of `target` with the study's window and layers.
    """
    rows, judge, samples = NamedRows(study.out / "shapes.jsonl"), study.judge, study.samples["kv"]
    tokens, n_layer = len(next(iter(judge.texts.values()))[0]), judge.n_layer
    usual = judge.kv_window
    kept = target * (tokens - usual) + usual  # cells of a routed layer
    for window in windows:

        def make(window=window):
            judge.kv_window = window
            goal = (kept - window) / (tokens - window)
            return judge.routers(
                routers_of(samples, "kv", DEFAULT_SCORES["kv"], "ridge", goal), goal
            )

        rows.add(
            f"window {window} {target}",
            make,
            window=window,
            layers=f"{study.layers[0]}-{study.layers[-1]}",
        )
    judge.kv_window = usual
    bytes_all = len(routed_layers(None, n_layer, "attn")) * (
        tokens - kept
    )  # saved with the default layers
    for layers in layer_sets:
        chosen = routed_layers(parse_layers(layers), n_layer, "attn")

        def make(chosen=chosen):
            some = Samples({u: x for u, x in samples.x.items() if u.layer in chosen}, samples.cost)
            goal = (tokens - bytes_all / len(chosen) - usual) / (tokens - usual)
            return judge.routers(routers_of(some, "kv", DEFAULT_SCORES["kv"], "ridge", goal), goal)

        rows.add(f"layers {layers} {target}", make, window=usual, layers=layers)


def baselines(study: Study, rows: NamedRows, kind: str, target: float) -> None:
    """Judge baselines that drop whole units, the cheapest first.

    kv is also judged with a window, alone and with sinks, at equal K/V.
    """
    judge, samples = study.judge, study.samples[kind]

    def add(variant: str, make) -> None:
        rows.add(f"{kind} {variant} {target}", make, kind=kind, variant=variant, target=target)

    order = sorted((cost, unit.layer) for unit, cost in mean_cost(samples, kind).items())
    dropped = [layer for _, layer in order[: round((1 - target) * len(order))]]
    add("static", lambda: judge.static(kind, dropped, study.layers, judge.kv_window, judge.sinks))
    if kind == "kv":
        tokens = len(next(iter(judge.texts.values()))[0])
        window = round(judge.kv_window + target * (tokens - judge.kv_window))
        add(
            "sinks + window",
            lambda: judge.static(
                "kv", study.layers, study.layers, window - judge.sinks, judge.sinks
            ),
        )
        add("window", lambda: judge.static("kv", study.layers, study.layers, window))


def random_baseline(study: Study, rows: NamedRows, kind: str, target: float) -> None:
    routers = random_routers(study.samples[kind])
    rows.add(
        f"{kind} random {target}",
        lambda: study.judge.routers(routers, target, per_layer=True),
        kind=kind,
        variant="random",
        target=target,
    )


def random_routers(samples: Samples) -> dict:
    """Return routers with normal weights.

    Thresholds per layer give every layer the same activation.
    """
    generator = torch.Generator().manual_seed(0)
    return {
        u: (torch.randn(x.shape[1], generator=generator) * 0.05, torch.zeros(1))
        for u, x in samples.x.items()
    }


def passkeys(
    mod: str, haystack: str, out: Path, lengths: list[int], keys: int, threads: int
) -> None:
    """Append {length, trials, dense, mod, ..._by_depth} to passkey.jsonl."""
    torch.set_num_threads(threads)
    model, text = open_model(mod), data_text.read_texts([haystack])
    for length in lengths:
        row = eval_run.passkey(model, text, length, keys=keys)
        with (out / "passkey.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        logger.info(
            f"{length} tokens: dense {row['dense']:.2f}, MoD {row['mod']:.2f} of {row['trials']}"
        )


@click.group()
def study():
    """Compare ways to calibrate a Mixture-of-Depths model."""
    show_messages(clock=True)


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
        click.option("--layers-routed", "layers", default="auto", show_default=True),
        click.option("--sink-tokens", "sinks", default=SINK_TOKENS, show_default=True),
        click.option("--kv-window", default=KV_WINDOW, show_default=True),
        click.option("--threads", default=2, show_default=True),
    ):
        command = option(command)
    return command


@study.command()
@options
@click.option("--target", default=0.5, show_default=True)
def scores(target, **given):
    """Compare scores and fits of each kind at one activation."""
    made = Study(**given)
    for kind in made.kinds:
        compare_scores(made, kind, target)


@study.command()
@options
@click.option("--targets", default=TARGETS, show_default=True)
@click.option("--name", default="table", show_default=True, help="Rows go to NAME.jsonl.")
def table(targets, name, **given):
    """Compare the default score of each kind with baselines at several activations."""
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
    """Compare windows and layers of kv units at equal K/V.

    --layers-routed must cover all sets. The command needs a folder of its own.
    """
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
    """Measure passkey retrieval of a MoD directory and of its dense base."""
    passkeys(mod, haystack, out, [int(length) for length in lengths.split(",")], keys, threads)


@study.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the rows.")
@click.option(
    "--docs",
    type=click.Path(path_type=Path),
    help="Where the pictures go; default: the same folder.",
)
def report(out, docs):
    """Write tables (study.md, study.json) and pictures from the rows."""
    write_report(out, docs or out)


if __name__ == "__main__":
    study()
