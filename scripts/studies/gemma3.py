"""Convert and measure Gemma 3 270M, most of whose layers slide: docs/results/gemma-3-270m.md.

\b
    python scripts/fetch_gemma3.py gemma.gguf
    G="python -m scripts.studies.gemma3"
    $G make gemma.gguf --out study
    $G time gemma.gguf --out study       # needs the machine for itself
    $G judge gemma.gguf --out study --text wiki.txt --text book.txt --haystack book.txt
    $G report --out study                # the tables of the page

Each step is a command of mod-export, is printed, and leaves a file in --out. A step whose file is
there is not done again.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
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
PASSKEY_TOKENS = (2048, 8192, 16384, 32768)
BENCH_TOKENS = (2048, 8192, 32768)
DENSE = "dense"
PROMPT = "The city of Rome was founded"  # The model is not tuned for chat: it continues the text.
WHO = ("dense", "mod")
MOD_EXPORT = (sys.executable, "-m", "mod_export")
UNKNOWN = "-"

model_argument = click.argument("model", type=click.Path(exists=True, path_type=Path))
out_option = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of files and figures."
)
points_option = click.option(
    "--point",
    "points",
    multiple=True,
    type=click.Choice(list(POINTS)),
    default=list(POINTS),
    help="A point to measure; may be repeated.  [default: (all)]",
)
threads_option = click.option("--threads", type=click.IntRange(min=1), help="Of the runtime.")


def tokens_option(name: str, tokens: tuple[int, ...], what: str):
    return click.option(
        name,
        "tokens",
        multiple=True,
        type=click.IntRange(min=1),
        default=tokens,
        show_default=True,
        help=f"Number of tokens of {what}; may be repeated.",
    )


@click.group(help=__doc__)
def study():
    pass


@study.command()
@model_argument
@out_option
@points_option
@threads_option
def make(model, out, points, threads):
    """Convert, export onto the model's own file, verify, and continue a text."""
    out.mkdir(parents=True, exist_ok=True)
    limit = ("--threads", threads) if threads else ()
    complete = ("--raw", "--prompt", PROMPT, "--max-tokens", 48, "--temperature", 0, *limit)
    step(out / f"{DENSE}.chat.txt", "chat", model, *complete, stdout=True)
    for name in points:
        mod, file = out / name, out / f"{name}.gguf"
        step(mod, "convert", model, "-o", mod, *POINTS[name])
        step(file, "export", mod, "-o", file, "--base", model)
        check = ("verify", file, "--reference", mod, "--dense", model, "--json", *limit)
        # Code 1 says that bounds are not kept. The figures say so too.
        step(out / f"{name}.verify.json", *check, stdout=True, codes=(0, 1))
        step(out / f"{name}.chat.txt", "chat", file, *complete, stdout=True)


@study.command()
@model_argument
@out_option
@points_option
@click.option("--text", "texts", multiple=True, required=True, type=click.Path(exists=True))
@click.option("--haystack", required=True, type=click.Path(exists=True))
@click.option("--count", default=2, show_default=True, help="Sequences of each text.")
@tokens_option("--passkey", PASSKEY_TOKENS, "a passkey's prompt")
@click.option("--depths", default="0.1,0.5,0.9", show_default=True)
@click.option("--trials", default=1, show_default=True, help="Passkeys of each length and depth.")
@threads_option
def judge(model, out, points, texts, haystack, count, tokens, depths, trials, threads):
    """Measure perplexity, KL and passkeys against the dense file."""
    limit = ("--threads", threads) if threads else ()
    quality = [part for text in texts for part in ("--text", text)] + ["--count", count]
    for name in points:
        compare = ("eval", out / f"{name}.gguf", "--dense", model, *limit)
        target = out / f"{name}.quality.json"
        step(target, *compare, *quality, "--json", target)
        for length in tokens:
            hidden = ["--passkey", haystack, "--passkey-lengths", length]
            hidden += ["--passkey-depths", depths, "--passkey-trials", trials]
            target = out / f"{name}.passkey-{length}.json"
            step(target, *compare, *hidden, "--json", target)


@study.command("time")
@model_argument
@out_option
@points_option
@tokens_option("--context", BENCH_TOKENS, "a prompt")
@click.option("--rounds", default=12, show_default=True)
@click.option("--seconds", default=5, show_default=True)
@click.option("--variants", default="ceiling,mod,all_active", show_default=True)
def time_points(model, out, points, tokens, rounds, seconds, variants):
    """Time the files beside the dense one, on stock llama.cpp and on the patched one."""
    for name in points:
        for context in tokens:
            target = out / f"{name}.bench-{context}.json"
            options = ("--contexts", context, "--variants", variants)
            options += ("--rounds", rounds, "--seconds", seconds, "--json", target)
            step(target, "bench", out / f"{name}.gguf", "--dense", model, *options)


def step(target: Path, *args: object, stdout: bool = False, codes: tuple[int, ...] = (0,)) -> None:
    """Run a command of mod-export that makes `target`, unless it is there.

    stdout: what it prints is the target. codes: the exit codes of success. Raises UserError where
    it fails.
    """
    if target.exists():
        return
    words = [str(arg) for arg in args]
    print("mod-export", shlex.join(words), flush=True)
    if stdout:
        with atomic_file(target) as tmp:
            with tmp.open("wb") as file:
                code = subprocess.run([*MOD_EXPORT, *words], stdout=file).returncode
            _check(code, codes if tmp.stat().st_size else (), words[0])
    else:
        _check(subprocess.run([*MOD_EXPORT, *words]).returncode, codes, words[0])


def _check(code: int, codes: tuple[int, ...], name: str) -> None:
    if code not in codes:
        raise UserError(f"mod-export {name} failed with exit code {code}", "see its message above")


@study.command()
@out_option
def report(out):
    """Print the tables of the results page, of what has been measured."""
    for title, table in (
        ("quality", quality_table(out)),
        ("passkeys", passkey_table(out)),
        ("parity", parity_table(out)),
        ("time", time_table(out)),
        ("memory", memory_table(out)),
        ("runs", runs_table(out)),
        ("completions", completions(out)),
    ):
        click.echo(f"\n{title}\n\n{table or 'not measured yet'}")


def read(out: Path, part: str) -> Iterator[tuple[str, dict]]:
    """The name of each point with the results of a part, shorter contexts first.

    Raises UserError for a file that is no JSON.
    """
    for name in POINTS:
        files = out.glob(f"{name}.{part}*.json")
        for path in sorted(files, key=lambda path: (len(path.name), path.name)):
            try:
                yield name, json.loads(path.read_text())
            except ValueError as exc:
                raise UserError(
                    f"{path} is no result of a step: {exc}", "remove it and run the step again"
                ) from exc


def table(header: list[str], rows: list[list[str]]) -> str:
    """The rows in Markdown, or nothing where there are none."""
    return format_table(header, rows, markdown=True) if rows else ""


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
        for name, result in read(out, "quality")
        for row in result["texts"]
    ]
    header = ["model", "text", "perplexity dense", "MoD", "MoD / dense", "KL", "same best token"]
    return table([*header, "activation", "K/V of dense"], rows)


def passkey_table(out: Path) -> str:
    rows = []
    for name, result in read(out, "passkey"):
        for row in result["passkey"]:
            found = [f"{round(row[who] * row['trials'])} of {row['trials']}" for who in WHO]
            shares = [f"{row[key]:.3f}" for key in ("activation", "kv_share")]
            rows.append([name, str(row["length"]), *found, *shares])
    header = ["model", "tokens", "dense finds", "MoD finds", "activation", "K/V of dense"]
    return table(header, rows)


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
        for name, result in read(out, "verify")
    ]
    header = ["model", "same decisions", "same best token", "mean KL, file to torch"]
    return table([*header, "all active: KL to the original", "passed"], rows)


def time_table(out: Path) -> str:
    rows = []
    for name, result in read(out, "bench"):
        for row in result["rows"]:
            times = [f"{row['ms'][variant]:.2f}" for variant in ("ceiling", "mod")]
            ratios = [quartiles(row["ratios"].get(f"{v}/ceiling")) for v in ("mod", "all_active")]
            share = f"{row['activation']:.3f}"
            rows.append([name, str(row["context"]), row["phase"], *times, *ratios, share])
    header = ["model", "tokens", "phase", "dense, ms", "MoD, ms", "MoD / dense"]
    return table([*header, "all active / dense", "activation"], rows)


def quartiles(ratio: dict | None) -> str:
    if ratio is None:
        return UNKNOWN
    return f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"


def memory_table(out: Path) -> str:
    """K/V after the decode."""
    rows = []
    for name, result in read(out, "bench"):
        for row in result["rows"]:
            if row["phase"] == "decode":
                kv = row["kv_bytes"]["mod"]
                sizes = [f"{kv[key] / 2**20:.2f}" for key in ("dense", "used", "committed")]
                shares = [kv["used"] / kv["dense"], kv["committed"] / kv["used"]]
                shares = [f"{share:.3f}" for share in shares]
                rows.append([name, str(row["context"]), *sizes, *shares])
    header = ["model", "tokens", "K/V dense, MiB", "used", "committed", "used / dense"]
    return table([*header, "committed / used"], rows)


def runs_table(out: Path) -> str:
    """When and where the times were measured."""
    rows = []
    for name, result in read(out, "bench"):
        about = result["about"]
        tokens = ", ".join(sorted({str(row["context"]) for row in result["rows"]}))
        where = [about["date"], about["cpu"], str(about["threads"]), str(about["busy_cores"])]
        rows.append([name, tokens, *where])
    return table(["model", "tokens", "date", "processor", "threads", "busy cores"], rows)


def completions(out: Path) -> str:
    files = {name: out / f"{name}.chat.txt" for name in (DENSE, *POINTS)}
    return "\n\n".join(
        f"{name}: {PROMPT} ...\n{path.read_text().strip()}"
        for name, path in files.items()
        if path.exists()
    )


if __name__ == "__main__":
    run_script(study)
