"""The command `mod-export bench`."""

import json

import click

from mod_export.cli.options import (
    SHIFT_HELP,
    dense_option,
    gpu_layers_option,
    mod_option,
    text_option,
    threads_option,
)
from mod_export.cli.output import name_plots, result_options, write_result
from mod_export.cli.values import Finite, RenamedOption, comma_list, model_argument, on_or_off


@click.command()
@model_argument()
@mod_option()
@dense_option(
    "Dense GGUF of the same model and quantisation.",
    show_default="FILE with --mod, else it is needed",
)
@click.option(
    "--contexts",
    callback=comma_list(int, 16, example="512,2048"),
    show_default="of 512,2048,8192 those that the model is trained for",
    help="Prompt lengths in tokens, with commas.",
)
@click.option(
    "--batch",
    "batches",
    default="1",
    show_default=True,
    callback=comma_list(int, 1, example="1,2,4,8"),
    help="Numbers of sequences that are decoded at once, with commas.",
)
@click.option(
    "--kv-type",
    "kv_types",
    cls=RenamedOption,
    former="--kv-types",
    show_default="f16",
    callback=comma_list(str, example="f16,q8_0,q4_0"),
    help="Types of K and V in the cache, with commas; `q8_0/f16` is one of K and one of V.",
)
@click.option(
    "-ctk",
    "--cache-type-k",
    "types_k",
    callback=comma_list(str, example="f16,q8_0"),
    help="Types of K, with commas: each with each of -ctv, instead of --kv-type.",
)
@click.option(
    "-ctv",
    "--cache-type-v",
    "types_v",
    callback=comma_list(str, example="f16,q8_0"),
    help="Types of V, with commas.",
)
@click.option(
    "--threshold-shift",
    "shifts",
    callback=comma_list(float, example="-1,0,1"),
    show_default="0",
    help=f"{SHIFT_HELP} Several, with commas.",
)
@click.option(
    "-ub",
    "--ubatch",
    "ubatches",
    default="512",
    show_default=True,
    callback=comma_list(int, 1, example="64,512"),
    help="Numbers of tokens in a graph of the prefill, with commas.",
)
@click.option(
    "-fa",
    "--flash-attn",
    default="on",
    show_default=True,
    callback=comma_list(on_or_off, example="on,off"),
    help="Flash attention: on, off or on,off.",
)
@click.option(
    "--variants",
    callback=comma_list(str, example="ceiling,mod,floor"),
    show_default="all",
    help="Measure only these variants, with commas.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="Least number of turns of each variant.",
)
@click.option(
    "--seconds",
    type=Finite(min=0),
    default=10,
    show_default=True,
    help="Least time for each phase of a measurement, in seconds.",
)
@click.option(
    "--starts",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many times the processes are started: the place in memory alone makes some percent.",
)
@threads_option
@gpu_layers_option
@text_option("Text of the prompts.", "the packaged text, repeated")
@click.option(
    "--sweep-activation",
    "sweep",
    is_flag=True,
    help="Measure the curve of speed and quality: KL and time at the shifts that give "
    "--activations.",
)
@click.option(
    "--activations",
    callback=comma_list(float, 0, example="1,0.5,0.1"),
    show_default="1 to 0.1; with --threshold-shift, these shifts",
    help="Activations that --sweep-activation aims at, with commas.",
)
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(("text", "md", "jsonl")),
    default="text",
    show_default=True,
    help="Form of what is printed; jsonl: rows of llama-bench on stdout, tables on stderr.",
)
@result_options(plots="Directory for PNG plots.")
def command(
    file, dense, text, form, json_file, markdown, force, plots, sweep, activations, **options
):
    """Measure speed and KV memory against the dense model.

    FILE is a MoD GGUF, or a dense one with --mod. The dense model runs on stock llama.cpp, which
    the first call builds in minutes, unless `mod-export build --stock` has built it.
    """
    from mod_export.benchmark import plots as bench_plots
    from mod_export.benchmark import report as bench_report
    from mod_export.benchmark import run as bench_run
    from mod_export.benchmark import sweep as bench_sweep
    from mod_export.benchmark.llama_bench import llama_bench_rows
    from mod_export.common.plots import check_folder
    from mod_export.errors import UserError

    if dense is None:
        if not options["mod"]:
            raise UserError("the dense model is missing", "give it with --dense")
        dense = file
    targets = activations or (None if options["shifts"] else bench_sweep.TARGETS)
    if activations and (not sweep or options["shifts"]):
        raise UserError(
            "--activations are targets of a sweep",
            "use --sweep-activation, without --threshold-shift",
        )
    if form == "jsonl" and json_file == "-":
        raise UserError("two results cannot go to stdout", "give --json a file, or leave out -o")
    if plots:
        check_folder(plots, force)
    options["kv_types"] = _kv_types(options)
    options = bench_run.BenchOptions(
        **{name: value for name, value in options.items() if value is not None}
    )

    def run() -> dict:
        result = _measure(file, dense, options, text, targets if sweep else ())
        elsewhere = json_file == "-" or form == "jsonl"
        click.echo(bench_report.tables(result, markdown or form == "md"), err=elsewhere)
        if form == "jsonl":
            for row in llama_bench_rows(result):
                click.echo(json.dumps(row))
        return result

    result = write_result(run, json_file, force)
    if plots:
        name_plots(bench_plots.draw(result, plots, force))


def _kv_types(options: dict) -> tuple[str, ...] | None:
    """The types of K and V of --kv-type, or every combination of -ctk and -ctv, which it takes out.

    Raises UserError where both ways are used.
    """
    from mod_export.errors import UserError

    k, v, pairs = options.pop("types_k"), options.pop("types_v"), options["kv_types"]
    if k is v is None:
        return pairs
    if pairs:
        raise UserError("types of K and V are given twice", "use --kv-type, or -ctk and -ctv")
    return tuple(f"{a}/{b}" for a in k or ["f16"] for b in v or ["f16"])


def _measure(file, dense, options, text, targets: tuple[float, ...] | None) -> dict:
    """Measure a sweep to these targets.

    None: over the shifts of the options; (): no sweep, but an ordinary benchmark.
    """
    from mod_export.benchmark import run as bench_run
    from mod_export.benchmark import sweep as bench_sweep
    from mod_export.data.text import read_texts

    words = read_texts([text]) if text else None
    if targets == ():
        return bench_run.bench(file, dense, options, words)
    return bench_sweep.sweep(file, dense, options, targets, words)
