"""`mod-export convert`: options for convert.py."""

import time

import click


@click.command("convert")
@click.argument("model")
@click.option("--output", "-o", required=True, type=click.Path(), metavar="DIR", help="Directory to write.")
@click.option("--units", default="kv", show_default=True, metavar="KINDS",
              help="What a token may skip: kv (being remembered), attn, block, ffn; combined with +.")
@click.option("--target-activation", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.5,
              show_default=True, help="Share of (token, unit) pairs that are to run.")
@click.option("--kv-window", type=click.IntRange(min=1), default=64, show_default=True,
              help="Recent tokens that kv units always see.")
@click.option("--layers", default="auto", show_default=True, help="Layers to route: auto, 3-28, 2,4,8-11.")
@click.option("--calibration-text", multiple=True, type=click.Path(), metavar="FILE",
              help="UTF-8 text to calibrate on, may be repeated; default: the text that comes with the package.")
@click.option("--sink-tokens", type=click.IntRange(min=0), default=4, show_default=True,
              help="First tokens of a sequence, which are always active.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
def command(model, output, units, target_activation, kv_window, layers, calibration_text, sink_tokens, force):
    """Make a Mixture-of-Depths model from MODEL, without training.

    MODEL is a Hugging Face directory, a GGUF file that transformers can load, or `smollm2`. Routers and
    thresholds are calibrated on text, in minutes on a CPU; docs/calibration.md says how well that works.
    """
    from mod_export.convert import convert

    start = time.monotonic()
    convert(
        model, output, units, target_activation, kv_window, layers, calibration_text, sink_tokens, force,
        say=lambda line: click.echo(line if "\n" in line else f"[{time.monotonic() - start:4.0f} s] {line}", err=True),
    )  # fmt: skip
    click.echo(output)
