"""The command `mod-export lm-eval`."""

import click

from mod_export.cli.device_options import device_option, dtype_option
from mod_export.cli.options import (
    base_option,
    cache_type_options,
    gpu_layers_option,
    mod_option,
    threads_option,
    threshold_shift_option,
)
from mod_export.cli.output import show_messages
from mod_export.cli.passed_on import PassingCommand, passed_on
from mod_export.cli.values import model_argument
from mod_export.common import extras


@click.command("lm-eval", cls=PassingCommand)
@model_argument("target", gguf=False)
@mod_option("TARGET, a GGUF file")
@base_option
@threshold_shift_option
@cache_type_options(" of TARGET, a GGUF file", "f16; f32 for a file in f32")
@threads_option
@gpu_layers_option
@device_option
@dtype_option
def command(target, types, base, **options):
    """Run lm-evaluation-harness on a model.

    TARGET is an adapter, a MoD directory, a GGUF file, or the name of one on the Hugging Face hub.
    What follows -- are the harness's own options, such as: mod-export lm-eval model.gguf -- --tasks
    arc_easy --limit 100. The harness is a package of its own: pip install 'mod_export[lm-eval]'.
    """
    extras.require("lm_eval")
    from mod_export.evaluation import harness

    show_messages()
    options |= {"cache_types": types and str(types), "base": base and str(base)}
    harness.run(passed_on(), str(target), **options)
