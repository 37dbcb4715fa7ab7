"""Train the routers of a MoD model, and its weights if wanted.

Training aims to keep the quality of the original model.

    train("adapter", "trained", TrainConfig(data=("texts/",), target=0.5))

A run starts from an adapter or a directory of `mod-export convert`, distils from the original
model, and writes an adapter, or a directory where the weights have changed. While it runs, OUT.run
holds checkpoint, metrics and plots. docs/explanation/training-method.md says what is done.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mod_export import adapter
from mod_export.common.files import check_dir, locked
from mod_export.common.progress import stage
from mod_export.config import MoDConfig
from mod_export.data.packing import PackedData, open_data, split
from mod_export.errors import UserError
from mod_export.formats import adapter_files, hf_directory, hub
from mod_export.model import architectures, loading
from mod_export.model.lora import merge_lora
from mod_export.model.mod_model import MoDModel
from mod_export.training import checkpoints, devices, environment, four_bit, room, steady_router
from mod_export.training.callbacks import MIN_SEQUENCES, RouterCallback
from mod_export.training.config import TrainConfig
from mod_export.training.log import plot
from mod_export.training.loop import Loop
from mod_export.training.prepare import Source, prepare
from mod_export.training.relaxation import relaxed_attention
from mod_export.units import KV

logger = logging.getLogger(__name__)

SLOW_RATIO = 1.2  # time in bf16 over that in float32, from which on bf16 is said to be slow


@dataclass(frozen=True)
class Output:
    """Where a run writes, and how.

    save_as: `adapter`, `full`, a MoD directory, or None until the model is known.
    """

    path: Path
    save_as: str | None
    resume: bool
    force: bool

    @property
    def run(self) -> Path:
        """The directory of checkpoint, metrics and plots."""
        return Path(f"{os.path.normpath(self.path)}.run")


def train(
    directory: str,
    out: str,
    config: TrainConfig,
    save_as: str | None = None,
    resume: bool = False,
    force: bool = False,
    base: str | Path | None = None,
) -> dict:
    """Train the MoD model of `directory`, write `out`, and return figures on held-out text.

    directory, base: as adapter.open_model takes them. save_as: `adapter`, or `full`, a MoD
    directory; None is `adapter` where one can hold what comes out. Of several processes the main
    one alone logs. Raises UserError for anything that does not fit, and SystemExit after SIGTERM or
    SIGINT, with a checkpoint.
    """
    from accelerate import Accelerator

    output = Output(Path(out), save_as, resume, force)
    _check(config, output)
    device = devices.choose(config.device, environment.processes(os.environ))
    precision = devices.autocast(config.precision, device)
    environment.check(os.environ, precision)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    environment.check_made(accelerator)
    devices.check_four_bit(config, accelerator)
    with one_voice(accelerator.is_main_process):
        _warn_of_slow_precision(accelerator)
        config = with_length(directory, config)
        weights = adapter_files.weights_of(directory, base)
        dtype = devices.weights_type(config, loading.stored_type(weights), device, precision)
        room.check(directory, base, config, dtype, accelerator)
        model, identity = _load(directory, base, config, dtype, device)
        _check_model(directory, model, config)
        output = _form(output, directory, model, config)
        with accelerator.main_process_first():  # the others find the tokens in the cache
            data, held_out = data_of(model, config)
            output.run.mkdir(exist_ok=True)
        with alone(output.run) if accelerator.is_main_process else contextlib.nullcontext():
            source = Source(str(weights), model, identity, data, held_out)
            return _run(source, config, accelerator, output)


def with_length(directory: str, config: TrainConfig) -> TrainConfig:
    """Return the options with a length for the windows of an adapter or a MoD directory."""
    path = hub.locate(directory)
    found = adapter_files.find(path)
    mod = adapter_files.read(found).config if found else hf_directory.read_config(path)
    return config.for_window(mod.kv_window if KV in mod.units else 0)


def _load(
    name: str,
    base: str | Path | None,
    config: TrainConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[MoDModel, dict]:
    """Return the MoD model of an adapter or a directory, and the identity of its base."""
    logger.info(f"loading {name}")
    with stage(f"loading {name}"):
        model, tokenizer, mod, routers = adapter.load_parts(name, base, dtype)
    called = str(mod.calibration.get("model") or Path(name).resolve().name)
    with stage("identifying the base model"):
        identity = adapter.base_identity(model, tokenizer, called)
    if config.four_bit:
        four_bit.to_four_bit(model, device)
    return MoDModel.from_base(model, tokenizer, mod, routers), identity


def _form(output: Output, directory: str, model: MoDModel, config: TrainConfig) -> Output:
    """Return the output with its form: an adapter where that can hold what is trained."""
    found = adapter_files.find(directory)
    if output.save_as == "adapter" and found is not None and adapter_files.read(found).lora:
        raise UserError(
            f"{directory} has LoRA of its own, which a second adapter would not hold",
            "leave out --save adapter",
        )
    if output.save_as is None and (
        config.parameters == "full" or not model.config.base_is_original
    ):
        logger.info("a whole directory will be written: the weights are no longer the original's")
        output = replace(output, save_as="full")
    output = replace(output, save_as=output.save_as or "adapter")
    _check_four_bit(output, config)
    return output


def _check_four_bit(output: Output, config: TrainConfig) -> None:
    """Raise UserError where weights of 4 bits would have to be saved."""
    if output.save_as == "full" and config.four_bit:
        raise UserError(
            "weights of 4 bits are no model to save", "use --save adapter, or leave out --four-bit"
        )


@contextlib.contextmanager
def one_voice(is_main: bool) -> Iterator[None]:
    """Inside, only the main process logs: the messages of the others repeat its messages."""
    package = logging.getLogger("mod_export")
    level = package.level
    if not is_main:
        package.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        package.setLevel(level)


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """Hold the run directory; raise UserError where another process trains into it."""

    def busy():
        raise UserError(
            f"another process trains into {run}", "wait for it, or choose another output"
        )

    with locked(run, busy):
        checkpoints.clean(run)
        yield


def _run(source: Source, config: TrainConfig, accelerator: Any, output: Output) -> dict:
    loop = Loop(prepare(source, config, accelerator, output.run))
    with relaxed_attention(source.model.base):
        figures = _go(loop, accelerator, output)
    room.tell_peak(accelerator.device)
    _log_figures(figures)
    source.model.config = _config(source.model, loop, config, figures)
    devices.gather(loop.student, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        _finish(source, loop, output, figures)
    accelerator.wait_for_everyone()
    return figures


def _go(loop: Loop, accelerator: Any, output: Output) -> dict:
    """Prepare the routers, or go back to a checkpoint, and run the steps."""
    callback, first = RouterCallback(), 0
    if output.resume:
        first = loop.restore()
    else:
        callback.on_start(loop)
    logger.info(
        f"{loop.steps} steps of {loop.tokens_per_step} tokens, "
        f"{sum(p.numel() for p in loop.trainable()):,} parameters, {accelerator.device}, "
        f"{accelerator.mixed_precision} mixed precision"
    )
    if not output.resume and accelerator.is_main_process:
        clear(output.run)
    accelerator.wait_for_everyone()
    return loop.go(callback, first)


def _finish(source: Source, loop: Loop, output: Output, figures: dict) -> None:
    """Write what came out, and the plots."""
    steady_router.remove(source.model)
    try:
        write(source, output, figures)
    except UserError as error:
        if not error.message.startswith("cannot write"):
            raise
        # A full disk, after hours.
        raise UserError(
            error.message, f"{output.run} has the last step: make room, then go on with --resume"
        ) from error
    logger.info(f"{output.path} is written; metrics and plots are in {output.run}")
    try:
        plot(output.run, loop.units)
    except ModuleNotFoundError as error:  # where there is no network to install it
        logger.warning(f"no plots: {error.name} is not installed")


def _log_figures(figures: dict) -> None:
    shares = ", ".join(f"{kind} {share:.3f}" for kind, share in figures["activation"].items())
    logger.info(
        f"held-out text: KL {figures['kl']:.4f}, perplexity {figures['perplexity']:.2f} (dense "
        f"{figures['perplexity_dense']:.2f}), K/V {figures['kv_share']:.3f} of dense, "
        f"active {shares}"
    )


def write(source: Source, output: Output, figures: dict) -> None:
    """Write the model as a MoD directory or as an adapter."""
    model = source.model
    if output.save_as == "adapter":
        names = {
            "kl": "KL",
            "perplexity": "perplexity",
            "perplexity_dense": "of dense",
            "kv_share": "K/V of dense",
        }
        named = {name: f"{figures[key]:.4g}" for key, name in names.items()}
        routers = model.router_tensors()
        origin = hub.reference(source.directory)
        adapter.save(
            output.path,
            model.config,
            routers,
            model.base,
            source.identity,
            named,
            output.force,
            origin,
        )
        return
    merge_lora(model.base)
    model.save(output.path, force=output.force)


def _config(model: MoDModel, loop: Loop, config: TrainConfig, figures: dict) -> MoDConfig:
    """Return the model's configuration with its thresholds and activations as they are now.

    It holds a record of the training.
    """
    units, routed = {}, model.config.by_kind()
    activation = (
        loop.activation_at_thresholds if config.method == "threshold" else loop.activation_held_out
    )
    for kind, unit in model.config.units.items():
        units[kind] = unit.with_values(
            {unit: model.router(unit).threshold for unit in routed[kind]},
            {unit: activation[unit] for unit in routed[kind]},
        )
    training = {
        **config.to_dict(),
        "data": [Path(p).name for p in config.data],
        "held_out": figures,
    }
    top_k = {}
    if config.method == "topk":
        top_k = {kind: config.target_of(kind) for kind in units}
    record = {**model.config.calibration, "training": training}
    is_original = model.config.base_is_original
    if config.parameters != "routers":
        is_original = False
        record.pop("model", None)  # the record names the original
    changed = replace(
        model.config,
        base_is_original=is_original,
        top_k=top_k,
        units=units,
        calibration=record,
    )
    return changed.validate(model.n_layer)


def _check(config: TrainConfig, output: Output) -> None:
    """Check what can be known before minutes of work; raise UserError."""
    if output.save_as == "adapter" and config.parameters == "full":
        raise UserError(
            "all weights are trained, which no adapter holds",
            "train routers or lora, or leave out --save adapter",
        )
    _check_four_bit(output, config)
    check_dir(output.path, output.force)
    if output.resume:
        checkpoints.load(output.run)
    elif (output.run / checkpoints.NAME).exists() and not output.force:
        raise UserError(
            f"{output.run} holds the checkpoint of a run",
            "go on with --resume, or use --force to replace it",
        )


def _warn_of_slow_precision(accelerator: Any) -> None:
    if accelerator.device.type != "cpu" or accelerator.mixed_precision != "bf16":
        return
    if (ratio := devices.bf16_slowdown()) > SLOW_RATIO:
        logger.warning(
            f"note: bf16 takes {ratio:.1f} times as long as float32 on this CPU; "
            "--precision no is faster"
        )


def _check_model(directory: str, model: MoDModel, config: TrainConfig) -> None:
    """Raise UserError where the model cannot be trained as the options say."""
    if not config.teacher and not model.config.base_is_original:
        raise UserError(
            f"the weights of {directory} are trained, so they are not the original's",
            "name the original with --teacher",
        )
    if not model.config.routed():
        raise UserError(
            f"{directory} routes nothing", "make a MoD model with mod-export convert first"
        )
    config.validate(list(model.config.units))


def data_of(model: MoDModel, config: TrainConfig) -> tuple[PackedData, PackedData]:
    """Return the sequences to train on and the held-out ones.

    Raises UserError where the data do not fit the model or the options.
    """
    longest = architectures.context_length(model.base) or config.length
    if config.length > longest:
        raise UserError(
            f"sequences of {config.length} tokens do not fit the model's context of {longest}",
            f"use --length {longest} or less",
        )
    window = model.config.kv_window
    if KV in model.config.units and config.length <= window:
        raise UserError(
            f"sequences of {config.length} tokens fit in the window of {window}: "
            "nothing is forgotten",
            f"use a --length well above {window}, or convert with a smaller --kv-window",
        )
    data = open_data(model.tokenizer, config.data, config.length, config.loss_on, config.limit)
    least = config.held_out + MIN_SEQUENCES
    if len(data) < least:
        raise UserError(
            f"data too short: {len(data)} sequences of {config.length} tokens where {least} are "
            "needed",
            _longer_data(
                config, data.source.count // least, window if KV in model.config.units else 0
            ),
        )
    return split(data, config.held_out)


def _longer_data(config: TrainConfig, length: int, window: int) -> str:
    """The cure for data that are too short; `length` is the longest that would do."""
    cures = ["give more text"]
    if config.limit is not None:
        cures.append("a larger --limit")
    if length >= max(16, window + 1):
        cures.append(f"use --length {length} or less")
    elif config.held_out > 1:
        cures.append("fewer --held-out")
    return ", or ".join(cures)


def clear(run: Path) -> None:
    """Remove what a former run left, once nothing is in the way of this one."""
    for name in (checkpoints.NAME, "metrics.jsonl", "loss.png", "units.png"):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
