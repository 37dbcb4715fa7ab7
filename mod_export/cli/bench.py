"""`mod-export bench`."""

from collections.abc import Callable

import click

from mod_export.cli.model import gpu_layers_option
from mod_export.cli.numbers import Finite


def _list(kind: Callable, least: float | None = None, example: str = "") -> Callable:
    """A callback that reads values with commas between them."""

    def read(_ctx, _param, value: str | None):
        if value is None:
            return None
        try:
            values = tuple(kind(x.strip()) for x in value.split(","))
        except ValueError:
            values = ()
        if (
            not values
            or (least is not None and min(values) < least)
            or any(v != v or v in (1e999, -1e999) for v in values if kind is float)
        ):
            from_ = f" of numbers from {least} up" if least is not None else ""
            raise click.BadParameter(f"{value!r} is no list{from_}, such as {example}")
        return tuple(dict.fromkeys(values))

    return read


def _switch(value: str) -> bool:
    if value not in ("on", "off"):
        raise ValueError
    return value == "on"


@click.command()
@click.argument("file", type=click.Path())
@click.option(
    "--dense",
    required=True,
    type=click.Path(),
    help="The dense GGUF of the same model and quantisation.",
)
@click.option(
    "--contexts",
    callback=_list(int, 16, "512,2048"),
    help="Prompt lengths in tokens, with commas. [default: of 512,2048,8192 those the model is trained for]",
)
@click.option(
    "--batch",
    "batches",
    default="1",
    show_default=True,
    callback=_list(int, 1, "1,2,4,8"),
    help="Sequences decoded at once, with commas.",
)
@click.option(
    "--kv-types",
    default="f16",
    show_default=True,
    callback=_list(str, None, "f16,q8_0,q4_0"),
    help="Types of K and V, with commas; `q8_0/f16`: of K and of V.",
)
@click.option(
    "--threshold-shift",
    "shifts",
    callback=_list(float, None, "-1,0,1"),
    help="Shifts of all thresholds in logit space, with commas.  [default: 0]",
)
@click.option(
    "--ubatch",
    "ubatches",
    default="512",
    show_default=True,
    callback=_list(int, 1, "64,512"),
    help="Tokens per graph in prefill, with commas.",
)
@click.option(
    "--flash-attn",
    default="on",
    show_default=True,
    callback=_list(_switch, None, "on,off"),
    help="on, off or on,off.",
)
@click.option(
    "--variants", callback=_list(str, None, "ceiling,mod,floor"), help="Only these.  [default: all]"
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="Turns of each variant, at least.",
)
@click.option(
    "--seconds",
    type=Finite(min=0),
    default=10,
    show_default=True,
    help="Time for each phase of a measurement, at least.",
)
@click.option(
    "--starts",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Times the processes are started anew: where one lies in memory makes some percent alone.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all cores.")
@gpu_layers_option
@click.option(
    "--text", type=click.Path(), help="Text of the prompts; default: the packaged one, repeated."
)
@click.option(
    "--sweep-activation",
    "sweep",
    is_flag=True,
    help="The speed/quality curve: shifts that give --activations, with KL to dense and time of each.",
)
@click.option(
    "--activations",
    callback=_list(float, 0, "1,0.5,0.1"),
    help="Targets of --sweep-activation.  [default: 1 to 0.1; with --threshold-shift, these shifts]",
)
@click.option("--plots", type=click.Path(), help="Directory for PNG plots.")
@click.option(
    "--json", "json_file", type=click.Path(), help="Write all figures here too; `-` is stdout."
)
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--force", is_flag=True, help="Replace existing outputs.")
def command(file, dense, text, json_file, markdown, force, plots, sweep, activations, **options):
    """Measure speed and memory of the MoD FILE against the dense one, and at both ends.

    The dense one runs on stock llama.cpp, which the first call builds, in minutes, if `mod-export
    build --stock` has not yet.
    """
    from mod_export.benchmark import plots as bench_plots
    from mod_export.benchmark import report as bench_report
    from mod_export.benchmark import run as bench_run
    from mod_export.benchmark import sweep as bench_sweep
    from mod_export.common.files import atomic_file
    from mod_export.common.plots import check_folder
    from mod_export.common.text import result_as_json
    from mod_export.errors import UserError

    targets = activations or (None if options["shifts"] else bench_sweep.TARGETS)
    if activations and (not sweep or options["shifts"]):
        raise UserError(
            "--activations are targets of a sweep",
            "use --sweep-activation, without --threshold-shift",
        )
    if plots:
        check_folder(plots, force)
    options = bench_run.BenchOptions(
        **{name: value for name, value in options.items() if value is not None}
    )

    def run() -> dict:
        result = _measure(file, dense, options, text, targets if sweep else ())
        click.echo(bench_report.tables(result, markdown), err=json_file == "-")
        return result

    def draw(result: dict) -> None:
        for path in bench_plots.draw(result, plots, force) if plots else ():
            click.echo(f"drew {path}", err=True)

    if json_file in (None, "-"):
        result = run()
        if json_file:
            click.echo(result_as_json(result))
        return draw(result)
    with atomic_file(
        json_file, force
    ) as tmp:  # asked for first: a long run must not end in a name that is taken
        result = run()
        tmp.write_text(result_as_json(result) + "\n")
    draw(result)


def _measure(file, dense, options, text, targets: tuple[float, ...] | None) -> dict:
    """A sweep to these targets (None: over the options' shifts), or with () an ordinary benchmark."""
    from mod_export.benchmark import run as bench_run
    from mod_export.benchmark import sweep as bench_sweep
    from mod_export.data.text import read_texts

    words = read_texts([text]) if text else None

    if targets == ():
        return bench_run.bench(file, dense, options, words)
    return bench_sweep.sweep(file, dense, options, targets, words)
