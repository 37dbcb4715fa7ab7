"""What commands that open a GGUF file have in common."""

import click

gpu_layers_option = click.option(
    "--gpu-layers",
    type=click.IntRange(min=-1),
    default=0,
    show_default=True,
    help="Layers of a GGUF on the GPU; -1: all. With a CUDA build.",
)
OPTIONS = (
    click.option(
        "--ctx",
        type=click.IntRange(min=0),
        default=4096,
        show_default=True,
        help="Context in tokens; 0: what the model was trained for.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all cores."),
    gpu_layers_option,
    click.option(
        "--threshold-shift",
        type=float,
        default=0.0,
        show_default=True,
        help="Shift of all thresholds in logit space: above 0 fewer tokens are active.",
    ),
)


def model_options(command):
    """Decorator of commands that hold a model open, `chat` and `serve`: the options that open_model
    takes.
    """
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def open_model(file: str, ctx: int, threads: int | None, gpu_layers: int, threshold_shift: float):
    """The MoDLlama of the options. Raises UserError, also for layers on a GPU that the library does
    not see.
    """
    from mod_export.runtime import devices
    from mod_export.runtime.llama import MoDLlama

    devices.check(gpu_layers)
    # a batch is the longest wait after Ctrl-C
    return MoDLlama(
        file,
        n_ctx=ctx,
        threads=threads,
        n_batch=256,
        n_gpu_layers=gpu_layers,
        threshold_shift=threshold_shift,
    )
