"""The command `mod-export eval`."""

import click

from mod_export.cli.device_options import device_option, dtype_option
from mod_export.cli.options import (
    base_option,
    cache_type_options,
    dense_option,
    gpu_layers_option,
    length_option,
    mod_option,
    text_option,
    threads_option,
    threshold_shift_option,
)
from mod_export.cli.output import name_plots, result_options, write_result
from mod_export.cli.values import comma_list, model_argument

# Those of evaluation/ruler/tasks.py, which `--help` does not wait for.
RULER_TASKS = (
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)


def ruler_tasks(_ctx, _param, value: str) -> tuple[str, ...]:
    """Read the names of tasks, with commas between them, or `all`."""
    if value == "all":
        return RULER_TASKS
    names = tuple(dict.fromkeys(part.strip() for part in value.split(","))) if value else ()
    for name in names:
        if name not in RULER_TASKS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(RULER_TASKS)}, all")
    return names


@click.command("eval")
@model_argument("target", gguf=False)
@mod_option("TARGET, a GGUF file")
@base_option
@dense_option(
    "Directory or GGUF to compare with, or the name of one on the Hugging Face hub.",
    gguf=False,
    show_default="TARGET with every unit active",
)
@text_option("Text to measure perplexity and KL on; may be repeated.", None)
@length_option(
    "; a text that is shorter gives one sequence",
    show_default="2048, or the context of the models where that is less",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Largest number of sequences of each text, which are spread evenly over it.",
)
@click.option(
    "--skip",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of first tokens of each sequence that do not count.",
)
@click.option(
    "--last",
    type=click.IntRange(min=1),
    show_default="all but those of --skip",
    help="Number of last tokens of each sequence that count.",
)
@click.option(
    "--tasks",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="Multiple-choice task: JSONL of question, choices, answer; may be repeated.",
)
@click.option(
    "--task-limit",
    type=click.IntRange(min=1),
    show_default="all",
    help="Number of items of each task.",
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
    callback=comma_list(int, 128, 1 << 30, "1024,2048"),
    show_default="of 1024,2048,4096 those that fit the model",
    help="Prompt lengths of --passkey in tokens, with commas.",
)
@click.option(
    "--passkey-depths",
    callback=comma_list(float, 0, 1, "0.1,0.5,0.9"),
    default="0.05,0.25,0.5,0.75,0.95",
    show_default=True,
    help="Places of the keys in the prompt, with commas: 0 is the beginning, 1 the end.",
)
@click.option(
    "--passkey-trials",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Number of keys for each length and depth.",
)
@click.option(
    "--ruler",
    callback=ruler_tasks,
    default="",
    metavar="TASKS",
    help="Tasks of RULER, with commas, or `all`: " + ", ".join(RULER_TASKS) + ".",
)
@click.option(
    "--ruler-lengths",
    callback=comma_list(int, 256, 1 << 30, "2048,4096"),
    show_default="of 2048,4096,8192 those that fit the model",
    help="Tokens of prompt and answer of --ruler, with commas.",
)
@click.option(
    "--ruler-samples",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Number of prompts for each task and length.",
)
@click.option(
    "--ruler-seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the prompts.",
)
@click.option(
    "--ruler-essays",
    type=click.Path(),
    metavar="FILE",
    show_default="the packaged texts",
    help="Text that needles are hidden in: plain, or JSON with a `text`.",
)
@click.option(
    "--ruler-squad",
    type=click.Path(),
    metavar="FILE",
    show_default="made-up questions",
    help="SQuAD's JSON, such as dev-v2.0.json, for qa_1.",
)
@click.option(
    "--ruler-hotpotqa",
    type=click.Path(),
    metavar="FILE",
    show_default="made-up questions",
    help="HotpotQA's JSON, such as hotpot_dev_distractor_v1.json, for qa_2.",
)
@threshold_shift_option
@cache_type_options(" of TARGET, a GGUF file", "f16; f32 for a file in f32")
@threads_option
@gpu_layers_option
@device_option
@dtype_option
@result_options(plots="Directory for PNG plots: passkeys as a heat map, accuracies.")
def command(
    target,
    mod,
    base,
    dense,
    threshold_shift,
    types,
    threads,
    gpu_layers,
    device,
    dtype,
    plots,
    json_file,
    markdown,
    force,
    **options,
):
    """Measure quality against the dense model: KL, tasks, passkeys, RULER.

    TARGET is an adapter, a MoD directory, a GGUF file, or the name of one on the Hugging Face hub.
    A dense TARGET without --dense gets figures of its own alone.
    """
    from mod_export.common.plots import check_folder
    from mod_export.evaluation import plots as eval_plots
    from mod_export.evaluation import report as eval_report
    from mod_export.evaluation import run as eval_run
    from mod_export.evaluation.ruler import answers

    plan = eval_run.EvaluationPlan(**options)
    if plots:
        check_folder(plots, force)

    def show(name: str, rows: list[dict]) -> None:
        click.echo(eval_report.table(name, rows, markdown) + "\n", err=json_file == "-")

    keep = None if json_file == "-" else json_file

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
            keep=keep,
            types=types,
            dtype=dtype,
            mod=mod,
            base=base,
        )

    result = write_result(run, json_file, force)
    if keep:
        answers.forget(keep)
    if plots:
        name_plots(eval_plots.draw(result, plots, force))
