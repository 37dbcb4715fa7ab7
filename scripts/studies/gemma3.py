"""Convert and measure Gemma 3 270M, most of whose layers slide: docs/results/gemma-3-270m.md.

    python scripts/fetch_gemma3.py gemma.gguf
    G="python -m scripts.studies.gemma3"
    $G make gemma.gguf --out study --text wiki.txt --text book.txt --haystack book.txt
    $G time gemma.gguf --out study       # needs the machine for itself
    $G report --out study                # the tables of the page

Each step is a command of mod-export, is printed, and leaves a file in --out. A step whose file is
there is not done again.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import click

from mod_export.cli.output import run_script
from mod_export.common.files import atomic_file
from mod_export.common.tables import format_table
from mod_export.errors import UserError

# name -> options of convert. One layer of six attends to the whole context: 5, 11 and 17.
POINTS = {
    "kv-50": ("--units", "kv", "--target-activation", "0.5"),
    "kv-25": ("--units", "kv", "--target-activation", "0.25"),
    "ffn-90": ("--units", "ffn", "--target-activation", "0.9"),
}
PASSKEYS = {"kv-50": "2048,8192,16384,32768", "kv-25": "2048,8192,16384,32768", "ffn-90": "2048"}
CONTEXTS = {"kv-50": "2048,8192,32768", "kv-25": "8192", "ffn-90": "8192"}
PROMPT = "The city of Rome was founded"
WHO = ("dense", "mod")
MOD_EXPORT = (sys.executable, "-m", "mod_export")

out_option = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of files and figures."
)
points_option = click.option(
    "--point", "points", multiple=True, type=click.Choice(list(POINTS)), default=list(POINTS)
)


@click.group(help=__doc__)
def study():
    pass


@study.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@out_option
@points_option
@click.option("--text", "texts", multiple=True, required=True, type=click.Path(exists=True))
@click.option("--haystack", required=True, type=click.Path(exists=True))
@click.option("--count", default=2, show_default=True, help="Sequences of each text.")
@click.option("--depths", default="0.1,0.5,0.9", show_default=True)
@click.option("--trials", default=1, show_default=True, help="Passkeys of each length and depth.")
def make(model, out, points, texts, haystack, count, depths, trials):
    """Convert, export onto the model's own file, verify, complete a text, and measure quality."""
    out.mkdir(parents=True, exist_ok=True)
    for name in points:
        mod, file = out / name, out / f"{name}.gguf"
        step(mod, "convert", model, "-o", mod, *POINTS[name])
        step(file, "export", mod, "-o", file, "--base", model)
        check = ("verify", file, "--reference", mod, "--dense", model, "--json")
        step(out / f"{name}.verify.json", *check, stdout=True)
        chat = ("chat", file, "--prompt", PROMPT, "--max-tokens", 48, "--temperature", 0)
        step(out / f"{name}.chat.txt", *chat, stdout=True)
        quality = [part for text in texts for part in ("--text", text)]
        quality += ["--count", count]
        target = out / f"{name}.quality.json"
        step(target, "eval", file, "--dense", model, *quality, "--json", target)
        hidden = ["--passkey", haystack, "--passkey-lengths", PASSKEYS[name]]
        hidden += ["--passkey-depths", depths, "--passkey-trials", trials]
        target = out / f"{name}.passkey.json"
        step(target, "eval", file, "--dense", model, *hidden, "--json", target)


@study.command("time")
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@out_option
@points_option
@click.option("--rounds", default=12, show_default=True)
@click.option("--seconds", default=5, show_default=True)
def time_points(model, out, points, rounds, seconds):
    """Time the files beside the dense one, on stock llama.cpp and on the patched one."""
    for name in points:
        target = out / f"{name}.bench.json"
        options = ("--contexts", CONTEXTS[name], "--variants", "ceiling,mod,all_active")
        options += ("--rounds", rounds, "--seconds", seconds, "--json", target)
        step(target, "bench", out / f"{name}.gguf", "--dense", model, *options)


def step(target: Path, *args: object, stdout: bool = False) -> None:
    """Run a command of mod-export that makes `target`, unless it is there.

    stdout: what it prints is the target. Raises UserError where it fails.
    """
    if target.exists():
        return
    words = [str(arg) for arg in args]
    print("mod-export", shlex.join(words), flush=True)
    if stdout:
        with atomic_file(target) as tmp, tmp.open("wb") as file:
            code = subprocess.run([*MOD_EXPORT, *words], stdout=file).returncode
            _check(code, words[0])
    else:
        _check(subprocess.run([*MOD_EXPORT, *words]).returncode, words[0])


def _check(code: int, name: str) -> None:
    if code:
        raise UserError(f"mod-export {name} failed with exit code {code}", "see its message above")


@study.command()
@out_option
def report(out):
    """Print the tables of the results page, of what has been measured."""
    for title, table in (
        ("quality", quality_table(out)),
        ("passkeys", passkey_table(out)),
        ("parity", parity_table(out)),
        ("time and memory", time_table(out)),
    ):
        click.echo(f"\n{title}\n\n{table}")


def read(out: Path, part: str) -> dict[str, dict]:
    """The results of the points that have this part."""
    files = {name: out / f"{name}.{part}.json" for name in POINTS}
    return {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}


def quality_table(out: Path) -> str:
    rows = [
        [
            name,
            Path(row["text"]).stem,
            f"{row['perplexity_dense']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['perplexity'] / row['perplexity_dense']:.4f}",
            f"{row['kl']:.4f}",
            f"{row['top1_agreement']:.3f}",
            f"{row['activation']:.3f}",
            f"{row['kv_share']:.3f}",
        ]
        for name, result in read(out, "quality").items()
        for row in result["texts"]
    ]
    header = ["model", "text", "perplexity dense", "MoD", "MoD / dense", "KL", "same best token"]
    return format_table([*header, "activation", "K/V of dense"], rows, markdown=True)


def passkey_table(out: Path) -> str:
    rows = []
    for name, result in read(out, "passkey").items():
        for row in result["passkey"]:
            found = [f"{round(row[who] * row['trials'])} of {row['trials']}" for who in WHO]
            shares = [f"{row[key]:.3f}" for key in ("activation", "kv_share")]
            rows.append([name, row["length"], *found, *shares])
    header = ["model", "tokens", "dense finds", "MoD finds", "activation", "K/V of dense"]
    return format_table(header, rows, markdown=True)


def parity_table(out: Path) -> str:
    rows = [
        [
            name,
            f"{result['decision_agreement']:.5f}",
            f"{result['top1_agreement']:.4f}",
            f"{result['mean_kl_all']:.1e}",
            f"{result['dense']['file_kl']:.1e}",
            "yes" if result["passed"] else "NO",
        ]
        for name, result in read(out, "verify").items()
    ]
    header = ["model", "same decisions", "same best token", "mean KL, file to torch"]
    return format_table([*header, "all active: KL to the original", "passed"], rows, markdown=True)


def time_table(out: Path) -> str:
    rows = []
    for name, result in read(out, "bench").items():
        for row in result["rows"]:
            kv = row["kv_bytes"]["mod"]
            times = [f"{row['ms'][variant]:.1f}" for variant in ("ceiling", "mod")]
            ratios = [row["ratios"][f"{variant}/ceiling"] for variant in ("mod", "all_active")]
            times += [f"{r['median']:.3f} ({r['q1']:.3f} to {r['q3']:.3f})" for r in ratios]
            sizes = [f"{kv[key] / 2**20:.2f}" for key in ("dense", "used", "committed")]
            share = f"{kv['committed'] / kv['used']:.3f}"
            rows.append([name, row["context"], row["phase"], *times, *sizes, share])
    header = ["model", "tokens", "phase", "dense, ms", "MoD, ms", "MoD / dense"]
    header += ["all active / dense", "K/V dense, MiB", "used", "committed", "committed / used"]
    return format_table(header, rows, markdown=True)


if __name__ == "__main__":
    run_script(study)
