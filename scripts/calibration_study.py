"""Compare ways to calibrate, and the result with plain baselines: the figures of docs/calibration.md.

    python scripts/calibration_study.py scores --text wiki=wiki.txt --text book=book.txt --out study
    python scripts/calibration_study.py table  --text wiki=wiki.txt --text book=book.txt --out study
    python scripts/calibration_study.py passkey --haystack long.txt --out study
    python scripts/calibration_study.py report --out study

Every finished row goes to study/*.jsonl at once; rows that are there are not computed again.
"""

import json
import sys
import time
from pathlib import Path

import click

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

SCORES_FIRST = {"kv": "max_value", "block": "gradient", "attn": "gradient", "ffn": "gradient"}
TARGETS = (0.9, 0.7, 0.5, 0.35)


class Rows:
    """Rows of a study in a JSONL file, each with a unique `name`."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.done = {row["name"]: row for row in map(json.loads, path.open())} if path.exists() else {}

    def add(self, name: str, make, **more) -> dict:
        if name not in self.done:
            start = time.monotonic()
            row = {"name": name, **more, **vars(make())}
            row["seconds"] = round(time.monotonic() - start, 1)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            say(f"{name}: activation {row['activation']:.3f}, KV {row['kv_share']:.3f}, KL {row['kl']:.4f}")
            self.done[name] = row
        return self.done[name]


def say(line: str) -> None:
    click.echo(f"[{time.process_time():5.0f} s CPU] {line}", err=True)


@click.group()
def study():
    """Compare ways to calibrate a Mixture-of-Depths model."""


def options(command):
    for option in (
        click.option("--model", default="smollm2", show_default=True),
        click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the results."),
        click.option("--threads", default=2, show_default=True),
        click.option("--layers", default="auto", show_default=True),
        click.option("--sinks", default=4, show_default=True),
        click.option("--kv-window", default=64, show_default=True),
    ):
        command = option(command)
    return command


def texts_option(command):
    return click.option("--text", "texts", multiple=True, required=True, metavar="NAME=FILE")(command)


def load(model: str, threads: int, layers: str):
    """Model, tokenizer, routed layers."""
    import torch

    from mod_export import convert, hf

    torch.set_num_threads(threads)
    base, tokenizer = hf.load(model)
    return base, tokenizer, convert.layers_of(convert.parse_layers(layers), len(hf.decoder_layers(base)))


def packed(tokenizer, texts: tuple, length: int, count: int) -> dict:
    from mod_export import data

    pairs = [text.split("=", 1) for text in texts]
    return {name: data.pack(tokenizer, data.read_texts([path]), length, count) for name, path in pairs}


@study.command()
@options
@texts_option
@click.option("--length", default=1024, show_default=True)
@click.option("--count", default=1, show_default=True, help="Sequences of each text.")
@click.option("--sequences", default=8, show_default=True, help="Calibration sequences.")
@click.option("--kinds", default="kv,attn,ffn,block", show_default=True)
@click.option("--target", default=0.5, show_default=True)
@click.option("--only", default="", help="Scores, separated by commas; default: all.")
def scores(model, out, threads, layers, sinks, kv_window, texts, length, count, sequences, kinds, target, only):
    """Compare scores and fits of each kind at one activation."""
    import torch
    from study import samples as s
    from study.judge import Judge

    from mod_export import data
    from mod_export.targets import SCORES

    base, tokenizer, routed = load(model, threads, layers)
    rows = Rows(out / "scores.jsonl")
    names = {kind: [n for n in SCORES[kind] if not only or n in only.split(",")] for kind in kinds.split(",")}
    cached = out / f"samples-{'-'.join(names)}.pt"
    if cached.exists():
        found = s.Samples(*torch.load(cached))
    else:
        ids = data.pack(tokenizer, data.default_texts()[0], 1024)
        found = s.collect(base, tokenizer, ids[:: max(1, len(ids) // sequences)][:sequences], names, routed, kv_window, sinks, say)
        torch.save((found.x, found.cost), cached)
    judge = Judge(base, tokenizer, packed(tokenizer, texts, length, count), sinks, kv_window)
    for kind, of_kind in names.items():
        compare(rows, judge, found, kind, of_kind, target, routed)


def compare(rows: Rows, judge, found, kind: str, names: list[str], target: float, routed: list[int]) -> None:
    """All scores with ridge, then the best score with the other fits; plain baselines."""
    from study import samples as s

    rounds = 0 if kind == "kv" else 2

    def judged(score: str, method: str):
        routers = s.routers_of(found, kind, score, method, target)
        return judge.routers(routers, target, per_layer="threshold" in method, rounds=rounds)

    made = [
        rows.add(f"{kind} {score} ridge {target}", lambda score=score: judged(score, "ridge"), kind=kind, score=score)
        for score in names
    ]
    best = min(made, key=lambda row: row["kl"])["score"]
    for method in s.METHODS[1:]:
        rows.add(f"{kind} {best} {method} {target}", lambda method=method: judged(best, method), kind=kind, score=best)
    baselines(rows, judge, found, kind, target, routed)


def baselines(rows: Rows, judge, found, kind: str, target: float, routed: list[int]) -> None:
    """Random routers, whole units dropped, and for kv a window alone and a window with sinks, at equal K/V."""
    from study import samples as s

    rounds = 0 if kind == "kv" else 1
    rows.add(f"{kind} random {target}", lambda: judge.routers(random_routers(found, kind), target, per_layer=True, rounds=rounds), kind=kind)
    order = sorted((cost, unit[0]) for unit, cost in s.mean_cost(found, kind).items())
    dropped = [layer for _, layer in order[: round((1 - target) * len(order))]]
    rows.add(f"{kind} static {target}", lambda: judge.static(kind, dropped, routed, judge.kv_window, judge.sinks), kind=kind)
    if kind != "kv":
        return
    tokens = len(next(iter(judge.texts.values()))[0])
    window = round(judge.kv_window + target * (tokens - judge.kv_window))
    rows.add(f"kv window {target}", lambda: judge.static("kv", routed, routed, window), kind=kind)
    rows.add(f"kv sinks+window {target}", lambda: judge.static("kv", routed, routed, window - judge.sinks, judge.sinks), kind=kind)


def random_routers(found, kind: str) -> dict:
    """Routers with normal weights; thresholds per layer give every layer the same activation."""
    import torch

    generator = torch.Generator().manual_seed(0)
    units = [unit for unit in found.x if unit[1] == kind]
    return {u: (torch.randn(found.x[u].shape[1], generator=generator) * 0.05, torch.zeros(1)) for u in units}


if __name__ == "__main__":
    study()
