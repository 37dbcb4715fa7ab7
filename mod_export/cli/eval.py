"""`mod-export eval`: options for evaluate.py."""

from collections.abc import Callable

import click

from mod_export.cli.model import gpu_layers_option


def _list(kind: Callable, low: float, high: float, example: str) -> Callable:
    """A callback that reads numbers with commas between them, each from low to high."""

    def read(_ctx, _param, value: str | None):
        if value is None:
            return None
        try:
            values = tuple(kind(part) for part in value.split(","))
        except ValueError:
            values = ()
        if not values or not all(low <= v <= high for v in values):
            raise click.BadParameter(
                f"{value!r} is no list of numbers from {low} to {high}, such as {example}"
            )
        return tuple(dict.fromkeys(values))

    return read


@click.command("eval")
@click.argument("target", type=click.Path())
@click.option(
    "--dense",
    type=click.Path(),
    metavar="MODEL",
    help="Compare with this directory or GGUF.  [default: TARGET with every unit active]",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="Perplexity and KL on this text; may be repeated.",
)
@click.option(
    "--length",
    type=click.IntRange(min=16),
    default=2048,
    show_default=True,
    help="Tokens in a sequence.",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Sequences of each text, spread evenly over it.",
)
@click.option(
    "--skip",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Leave out the first tokens of each sequence.",
)
@click.option(
    "--tasks",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="Multiple choice, JSONL of question, choices, answer; may be repeated.",
)
@click.option(
    "--task-limit", type=click.IntRange(min=1), help="Items of each task.  [default: all]"
)
@click.option(
    "--passkey",
    "haystack",
    type=click.Path(),
    metavar="FILE",
    help="Hide 5-digit keys in this text and ask for them.",
)
@click.option(
    "--passkey-lengths",
    callback=_list(int, 128, 1 << 30, "1024,2048"),
    help="Prompt lengths in tokens.  [default: of 1024,2048,4096 those that fit the model]",
)
@click.option(
    "--passkey-depths",
    callback=_list(float, 0, 1, "0.1,0.5,0.9"),
    default="0.05,0.25,0.5,0.75,0.95",
    show_default=True,
    help="Where the keys are: 0 is the beginning.",
)
@click.option(
    "--passkey-trials",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Keys for each length and depth.",
)
@click.option(
    "--threshold-shift",
    type=float,
    default=0.0,
    show_default=True,
    help="Shift of all thresholds in logit space: above 0 fewer tokens are active.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all cores.")
@gpu_layers_option
@click.option(
    "--device", default="cpu", show_default=True, help="Where torch models run, such as cuda."
)
@click.option(
    "--plots",
    type=click.Path(),
    help="Directory for PNG plots: passkeys as a heat map, accuracies.",
)
@click.option(
    "--json", "json_file", type=click.Path(), help="Write all figures here too; `-` is stdout."
)
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--force", is_flag=True, help="Replace existing outputs.")
def command(
    target,
    dense,
    threshold_shift,
    threads,
    gpu_layers,
    device,
    plots,
    json_file,
    markdown,
    force,
    **options,
):
    """Measure what TARGET, a MoD directory or GGUF file, loses against the dense model.

    A dense TARGET without --dense gets its own figures alone.
    """
    from mod_export.common.files import atomic_file
    from mod_export.common.plots import check_folder
    from mod_export.common.text import result_as_json
    from mod_export.evaluation import plots as eval_plots
    from mod_export.evaluation import report as eval_report
    from mod_export.evaluation import run as eval_run

    plan = eval_run.EvaluationPlan(**options)
    if plots:
        check_folder(plots, force)

    def show(name: str, rows: list[dict]) -> None:
        click.echo(eval_report.table(name, rows, markdown) + "\n", err=json_file == "-")

    def run() -> dict:
        return eval_run.evaluate(
            target,
            plan,
            dense,
            threshold_shift,
            threads,
            device,
            gpu_layers,
            done=show,
        )

    if json_file in (None, "-"):
        result = run()
        if json_file:
            click.echo(result_as_json(result))
    else:
        with atomic_file(
            json_file, force
        ) as tmp:  # asked for first: a long run must not end in a name that is taken
            result = run()
            tmp.write_text(result_as_json(result) + "\n")
    for path in eval_plots.draw(result, plots, force) if plots else ():
        click.echo(f"drew {path}", err=True)
