"""The command `mod-export convert`."""

import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from mod_export.cli.device_options import device_option, dtype_option
from mod_export.cli.export import QUANT_HELP
from mod_export.cli.options import (
    force_option,
    layers_routed_option,
    output_option,
    sink_tokens_option,
    units_option,
)
from mod_export.cli.output import show_messages
from mod_export.cli.values import ModelName, RenamedOption, SaveForm, shares
from mod_export.common.files import check_file, folder_beside
from mod_export.common.messages import called
from mod_export.config import KV_GRANULARITIES, KV_GRANULARITY
from mod_export.errors import UserError
from mod_export.formats import hub
from mod_export.formats.ggml_types import EXPORT_FORMATS

logger = logging.getLogger(__name__)


class Window(click.IntRange):
    """A number of tokens, at least 1, or `auto`."""

    name = "integer|auto"

    def __init__(self):
        super().__init__(min=1)

    def convert(self, value, param, ctx):
        """Return the number, or "auto". Fails with a usage error for anything else."""
        return value if value == "auto" else super().convert(value, param, ctx)


@click.command("convert")
@click.argument("model", type=click.Path())
@output_option("OUT", "Directory to write, or GGUF file where the name ends in .gguf.")
@click.option(
    "--save",
    type=SaveForm(),
    metavar="adapter|full",
    show_default="adapter; with --adapter full",
    help="What a directory holds: an adapter has the routers alone, kilobytes; full has the "
    "weights of MODEL too, in its own types.",
)
@units_option
@click.option(
    "--target-activation",
    default="0.5",
    show_default=True,
    callback=shares,
    metavar="SHARE",
    help="Share of (token, unit) pairs that run, of all kinds or of each: kv=0.5,attn=0.8.",
)
@click.option(
    "--kv-window",
    type=Window(),
    show_default="auto; in models with a context below 4096, 1/8 of it, at most 256",
    help="Number of recent tokens that kv units always see. auto: a number of its own for each "
    "unit, from 16 to 512, with which it remembers the fewest tokens.",
)
@click.option(
    "--kv-granularity",
    type=click.Choice(KV_GRANULARITIES),
    default=KV_GRANULARITY,
    show_default=True,
    help="What a decision of kv units is about: each K/V head, or a layer with all its heads. "
    "Models with one K/V head in a layer, and with MLA, have units of layers.",
)
@layers_routed_option(cls=RenamedOption, former="--layers")
@click.option(
    "--calibration-text",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    show_default="the packaged text",
    help="UTF-8 text to calibrate on; may be repeated.",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="all",
    help="Tokens of the text to use. Fewer take less time: routers of 2000 are poor, 10000 do.",
)
@sink_tokens_option()
@click.option(
    "--revision",
    metavar="REVISION",
    show_default="main",
    help="Branch, tag or commit of a MODEL of the Hugging Face hub.",
)
@click.option(
    "--adapter",
    type=ModelName(),
    metavar="ADAPTER",
    help="Take routers, and LoRA, from this adapter instead of calibrating: a directory, or the "
    "name of a packaged adapter or of one on the hub.",
)
@click.option(
    "--quant",
    type=click.Choice(list(EXPORT_FORMATS), case_sensitive=False),
    metavar="TYPE",
    show_default="q8_0; for a MODEL that is a GGUF file, and with --base, the types of that file",
    help=f"Of a GGUF file to write: {QUANT_HELP[0].lower()}{QUANT_HELP[1:]}",
)
@click.option(
    "--base",
    metavar="MODEL",
    type=ModelName(gguf=None, path_type=Path),
    show_default="MODEL",
    help="Of a GGUF file to write: put the routers on the weights of this model.",
)
@device_option
@dtype_option
@click.option(
    "--resume",
    is_flag=True,
    help="Keep what each layer gave in the folder OUT.run until the end, and go on from there "
    "where the same command was stopped.",
)
@force_option
@click.pass_context
def command(ctx, model, output, save, adapter, revision, quant, base, force, **options):
    """Make a Mixture-of-Depths model from an ordinary one.

    MODEL is the name of a model on the Hugging Face hub, such as Qwen/Qwen3-0.6B, a directory, a
    GGUF file, or `smollm2`. What runs is in docs/reference/architectures.md, and which GGUF files
    can be read in docs/how-to/convert-a-model.md. Nothing is trained: routers and thresholds are
    calibrated on text, in minutes on a CPU. docs/results/calibration.md says how well that works.
    Units of kv and block are calibrated with one layer in memory at a time. OUT is an adapter,
    which `mod-export export OUT --base FILE.gguf -o OUT.gguf` puts on any GGUF file of MODEL. With
    --adapter the routers come from an adapter that was trained for MODEL. An OUT that ends in .gguf
    is what `mod-export export` would write of the adapter and MODEL.
    """
    from mod_export.convert import FULL, convert, convert_adapter

    show_messages(clock=True)
    run = Path(f"{os.path.normpath(output)}.run")
    if adapter is not None:
        refuse_given(ctx, options)
        make = partial(convert_adapter, model, adapter=adapter, revision=revision)
    else:
        target, layers = options.pop("target_activation"), options.pop("layers_routed")
        options |= {"target": target, "layers": layers, "revision": revision}
        options["run"] = run if options.pop("resume") else None
        make = partial(convert, model, **options)
    if output.lower().endswith(".gguf"):
        refuse_of_directory(save, output)
        make = None if adapter is not None else make
        write_gguf(model, revision, adapter, make, output, quant, base, force)
    elif quant or base:
        option = "--quant" if quant else "--base"
        raise UserError(
            f"{option} is for a GGUF file, and {output} is a directory",
            f"leave out {option}, or let the name of the output end in .gguf",
        )
    elif adapter is None:
        make(output, force=force, **({"save": save} if save else {}))
        if save != FULL:
            logger.info(
                f"{output} holds the routers alone: `mod-export export {output} --base FILE.gguf "
                "-o OUT.gguf` puts them on a GGUF file of the model"
            )
    elif save in (None, FULL):
        make(output, force=force)
    else:
        raise UserError(f"{adapter} is an adapter already", "leave out --save adapter")
    if options.get("run"):
        shutil.rmtree(run, ignore_errors=True)
    click.echo(output)


def refuse_of_directory(save: str | None, output: str) -> None:
    """Raise UserError where --save stands beside a GGUF file."""
    if save:
        raise UserError(
            f"--save is for a directory, and {output} is a GGUF file", "leave out --save"
        )


def write_gguf(
    model: str,
    revision: str | None,
    adapter: str | None,
    make: Callable | None,
    output: str,
    quant: str | None,
    base: Path | None,
    force: bool,
) -> None:
    """Write a GGUF file of a model and an adapter.

    make: calibrates the adapter, in minutes, where none is given.
    """
    from mod_export.export import check_model, export
    from mod_export.formats.gguf import GGUFFile

    # What stands in the way fails before the minutes of work.
    check_file(output, force)
    if base is not None and not base.is_dir():
        GGUFFile.open(base).refuse_split()
    with folder_beside(output) as folder:
        made, probe = folder / "adapter", folder / "probe"

        def weights() -> Path:
            """What the routers go on."""
            return base if base is not None else hub.locate(model, revision)

        def check(torch_model, tokenizer, kinds) -> None:
            if weights().is_dir():
                check_model(torch_model, tokenizer, kinds, probe)

        name = f"the converted {model}"
        with called(made, name), called(probe, name):
            if make is not None:
                make(made, check=check)
            export(
                made if adapter is None else Path(adapter), output, quant, weights(), force=force
            )


def refuse_given(ctx, options):
    """Raise UserError for an option of calibration: an adapter holds its own."""
    spellings = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    for name in options:
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            option = spellings[name]
            raise UserError(
                f"{option} does not go with --adapter, which has its own", f"leave out {option}"
            )
