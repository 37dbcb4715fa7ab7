"""Train the routers of a MoD model, and its weights if wanted, so that it keeps the quality of the
original.

    train("mod", "trained", TrainConfig(data=("texts/",), target=0.5))

starts from a directory of `mod-export convert`, distils from the original model, and writes a
directory of the same form (or an adapter). While it runs, OUT.run holds checkpoint, metrics and
plots; docs/explanation/training-method.md says what is done.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mod_export import adapter
from mod_export.calibration import calibrate
from mod_export.calibration.thresholds import set_thresholds
from mod_export.common.files import check_dir, locked
from mod_export.config import UnitConfig
from mod_export.data.packing import PackedData, open_data, split
from mod_export.data.text import same_tokens
from mod_export.errors import UserError
from mod_export.model import architectures, loading
from mod_export.model.lora import inject_lora, merge_lora, without_lora
from mod_export.model.mod_model import MoDModel
from mod_export.model.routing import DecisionStrategy
from mod_export.training import checkpoints, devices, sharding, steady_router
from mod_export.training.config import TrainConfig
from mod_export.training.controller import Controller, groups_of
from mod_export.training.log import plot
from mod_export.training.loop import Loop
from mod_export.training.relaxation import Relaxation
from mod_export.training.student import Student, Weights

logger = logging.getLogger(__name__)

SETTLE = 16384  # tokens that thresholds are chosen on, in long sequences: memory counts there
SLOW = 1.2  # times as long as in float32, from which on a precision is said to be slow
DRIFT = 24576  # tokens that drift is measured on
MIN_SEQUENCES = 6  # of training, for either
# a bias moves its unit's activation, weights tell tokens apart; learning rate over that of weights
BIAS_RATE = 20.0
STATIC_LOGIT = 8.0  # of a unit that is always, or never, active


def train(
    directory: str,
    out: str,
    config: TrainConfig,
    save_as: str = "merged",
    resume: bool = False,
    force: bool = False,
) -> dict:
    """Train the MoD model in `directory` and write `out`; -> figures on held-out text.

    The main process alone logs. save_as: `merged`, a MoD directory, or `adapter`. Raises UserError for anything that does not
    fit, and SystemExit after SIGTERM or SIGINT, with a checkpoint.
    """
    from accelerate import Accelerator

    run = Path(f"{os.path.normpath(out)}.run")
    _check(config, Path(out), run, save_as, resume, force)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision=devices.autocast(config.precision)
    )
    with _one_voice(accelerator.is_main_process):
        return _train(directory, out, config, accelerator, run, save_as, resume, force)


@contextlib.contextmanager
def _one_voice(is_main: bool) -> Iterator[None]:
    """Inside, only the main process logs: the messages of the others repeat its messages."""
    package = logging.getLogger("mod_export")
    level = package.level
    if not is_main:
        package.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        package.setLevel(level)


def _train(
    directory: str,
    out: str,
    config: TrainConfig,
    accelerator,
    run: Path,
    save_as: str,
    resume: bool,
    force: bool,
) -> dict:
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu and accelerator.mixed_precision == "bf16" and (times := devices.slower()) > SLOW:
        logger.warning(
            f"note: bf16 takes {times:.1f} times as long as float32 on this CPU; --precision no is faster"
        )
    logger.info(f"loading {directory}")
    model = MoDModel.load(directory, getattr(torch, config.dtype))
    if not config.teacher and _is_trained(model.config):
        raise UserError(
            f"the weights of {directory} are trained, so they are not the original's",
            "name the original with --teacher",
        )
    kinds = list(model.config.units)
    if not model.config.routed():
        raise UserError(
            f"{directory} routes nothing", "make a MoD model with mod-export convert first"
        )
    config.validate(kinds)
    with accelerator.main_process_first():  # the others find the tokens in the cache
        data, held_out = _data(model, config)
        run.mkdir(exist_ok=True)
    with alone(run) if accelerator.is_main_process else contextlib.nullcontext():
        return _run(
            directory,
            out,
            model,
            config,
            accelerator,
            data,
            held_out,
            run,
            save_as,
            resume,
            force,
        )


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """Raises UserError where another process trains into the run directory."""

    def busy():
        raise UserError(
            f"another process trains into {run}", "wait for it, or choose another output"
        )

    with locked(run, busy):
        checkpoints.clean(run)
        yield


def _run(
    directory: str,
    out: str,
    model: MoDModel,
    config: TrainConfig,
    accelerator,
    data: PackedData,
    held_out: PackedData,
    run: Path,
    save_as: str,
    resume: bool,
    force: bool,
) -> dict:
    name = str(
        model.config.calibration.get("model") or Path(directory).resolve().name
    )  # of the original
    identity = adapter.base_identity(model.base, model.tokenizer, name)
    loop = prepare(directory, model, config, accelerator, data, held_out, run, identity)
    first = loop.restore() if resume else start(model, loop, config)
    logger.info(
        f"{loop.steps} steps of {loop.tokens} tokens, "
        f"{sum(p.numel() for p in loop.trainable()):,} parameters, {accelerator.device}, "
        f"{accelerator.mixed_precision} mixed precision"
    )
    if not resume and accelerator.is_main_process:
        clear(run)
    accelerator.wait_for_everyone()
    loop.go(first, functools.partial(halfway, model, loop, config))
    figures = finish(model, loop, config)
    sharding.gather(loop.student, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        steady_router.remove(model)
        try:
            write(model, out, save_as, identity, figures, force)
        except UserError as error:
            if not error.message.startswith("cannot write"):
                raise
            # a full disk, after hours
            raise UserError(
                error.message, f"{run} has the last step: make room, then go on with --resume"
            ) from error
        logger.info(f"{out} is written; metrics and plots are in {run}")
        try:
            plot(run, loop.units)
        except ModuleNotFoundError as error:  # where there is no network to install it
            logger.warning(f"no plots: {error.name} is not installed")
    accelerator.wait_for_everyone()
    return figures


def prepare(
    directory: str,
    model: MoDModel,
    config: TrainConfig,
    accelerator,
    data: PackedData,
    held_out: PackedData,
    run: Path,
    identity: dict,
) -> Loop:
    """Choose what is trained, make teacher, optimizer and controller, and give them to Accelerate."""
    units = model.config.routed()
    weights = Weights(config.kl_weight, config.hidden_weight, config.lm_weight)
    model.strategy = DecisionStrategy()  # not that of a baseline; the loop sets a baseline's own
    steady_router.install(model)
    teacher = None
    if (
        config.teacher or config.parameters == "full"
    ):  # held-out figures are against the original in any case
        teacher, tokenizer = loading.load(config.teacher or directory, getattr(torch, config.dtype))
        teacher.requires_grad_(False)
        check_teacher(teacher, tokenizer, model, config)
    anneal = round(config.anneal * config.steps(accelerator.num_processes))
    parameters = trained(model, config)
    groups = groups_of(units, config.per_layer)
    index = [[units.index(unit) for unit in group] for group in groups]
    student = Student(
        model,
        teacher,
        index,
        weights,
        Relaxation(config.temperature),
        config.recompute,
        lambda: without_lora(model.base),
    )
    # whatever --dtype the base weights have, routers and LoRA are float32
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    sharding.configure(accelerator)
    student, optimizer = accelerator.prepare(student, optimizer)
    targets = [config.target_of(group[0][1]) for group in groups]
    starts = [config.start_of(group[0][1]) for group in groups]
    fixed = 0.0 if config.method != "threshold" else config.load
    control = Controller(groups, targets, starts, anneal, fixed)
    told = {
        "options": config.fixed(),
        "base": identity,
        "data": data.fingerprint,
        "mod": replace(model.config, calibration={}).to_dict(),
        "processes": accelerator.num_processes,
    }
    return Loop(config, accelerator, student, optimizer, control, data, held_out, run, told)


def trained(model: MoDModel, config: TrainConfig) -> list[dict]:
    """Freeze everything, then free what is trained; -> the optimizer's groups, each with its
    learning rate.
    """
    model.requires_grad_(False)
    groups, rate = [], config.rate_of(architectures.n_embd(model.base))
    if config.method == "static":
        set_static(model, {kind: config.target_of(kind) for kind in model.config.units})
    else:
        routers = model.routers.values()
        groups.append({"params": [router.weight for router in routers], "lr": config.router_lr})
        groups.append(
            {"params": [router.bias for router in routers], "lr": BIAS_RATE * config.router_lr}
        )
    if config.parameters == "lora":
        lora = inject_lora(model.base, config.lora_rank, config.lora_alpha, seed=config.seed)
        groups.append({"params": lora, "lr": rate})
    elif config.parameters == "full":
        ends = {
            p
            for end in (model.base.get_input_embeddings(), model.base.get_output_embeddings())
            for p in end.parameters()
        }
        groups.append({"params": [p for p in model.base.parameters() if p not in ends], "lr": rate})
    for group in groups:
        for p in group["params"]:
            p.requires_grad_(True)
    return groups


def set_static(model: MoDModel, targets: dict[str, float]) -> None:
    """Baseline: of each kind the units with the highest activation so far are always active, the
    others never.
    """
    for kind, unit in model.config.units.items():
        layers = [layer for layer, p in enumerate(unit.threshold) if p > 0]
        by_use = sorted(layers, key=lambda layer: -unit.activation[layer])
        kept = set(by_use[: round(targets[kind] * len(layers))])
        for layer in layers:
            router = model.router((layer, kind))
            router.threshold = 0.5
            router.weight.data.zero_()
            router.bias.data.fill_(STATIC_LOGIT if layer in kept else -STATIC_LOGIT)


def start(model: MoDModel, loop: Loop, config: TrainConfig) -> int:
    """Routers held steady, and thresholds for the activation of the first step; -> 0, the step."""
    if config.method != "static":
        logger.info("measuring what drifts")
        _hold(model, loop, config)
    if config.method == "threshold":
        _settle(model, loop, config, loop.control.target(0).tolist())
    return 0


def halfway(model: MoDModel, loop: Loop, config: TrainConfig, step: int) -> None:
    """Routers lose the drift that training has brought back, and are held steady in what it has
    made of the model.

    The steps to come mend what that costs, and their learning rates are low: little drift comes
    back.
    """
    if (
        config.method == "threshold"
        and config.steady
        and not set(model.config.units) <= set(steady_router.KINDS_STEADY_FROM_START)
    ):
        logger.info("measuring what drifts in the model as it is now")
        _hold(model, loop, config, trained=True)
        _settle(model, loop, config, loop.control.target(step).tolist())


def finish(model: MoDModel, loop: Loop, config: TrainConfig) -> dict:
    """Thresholds for the target, and the figures of the hard model."""
    if config.method == "threshold":
        _settle(model, loop, config, loop.control.targets)
    loop.choose(loop.steps)
    figures = loop.evaluate()
    logger.info(
        f"held-out text: KL {figures['kl']:.4f}, perplexity {figures['perplexity']:.2f} (dense "
        f"{figures['perplexity_dense']:.2f}), K/V {figures['kv_share']:.3f} of dense, active "
        + ", ".join(f"{kind} {share:.3f}" for kind, share in figures["activation"].items())
    )
    model.config = _config(model, loop, config, figures)
    return figures


def _hold(model: MoDModel, loop: Loop, config: TrainConfig, trained: bool = False) -> None:
    """On training sequences, as _settle."""
    with loop.accelerator.autocast():
        steady_router.penalise_drift(
            model, _long(model, loop.train, DRIFT)[0], config.steady, _forward(loop), trained
        )


@torch.no_grad()
def _settle(model: MoDModel, loop: Loop, config: TrainConfig, targets: list[float]) -> None:
    """On training sequences, spread evenly and joined; not on the held-out ones, which judge it."""
    chosen, fresh = _long(model, loop.train, SETTLE)
    names = loop.control.names
    groups, shares = (
        dict(zip(names, values, strict=True)) for values in (loop.control.groups, targets)
    )
    with loop.accelerator.autocast():
        loop.settled = set_thresholds(
            model, chosen, groups, shares, forward=_forward(loop), novel=fresh
        )


def _forward(loop: Loop) -> Callable:
    """Of the hard model, through the prepared module: anywhere else its parameters may be in
    pieces.
    """
    return functools.partial(loop.student, teach=False)


def _long(model: MoDModel, data: PackedData, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of calibrate.LONG tokens, each of consecutive ones of the data, from all over it;
    `tokens` in all.

    -> ids, and whether their activation counts, [n, T] each.
    """
    many = calibrate.together(model.base, data.length, len(data))
    available = len(data) // many
    count = min(available, max(-(-MIN_SEQUENCES // many), tokens // (many * data.length)))
    starts = [i * available // count * many for i in range(count)]
    joined = [[data[k] for k in range(at, at + many)] for at in starts]
    return tuple(
        torch.stack([torch.cat([item[name] for item in items]) for items in joined])
        for name in ("input_ids", "fresh")
    )


def _config(model: MoDModel, loop: Loop, config: TrainConfig, figures: dict):
    """The model's configuration with the thresholds and activations as they are now, and a record
    of the training.
    """
    n_layer, units = model.n_layer, {}
    activation = loop.settled if config.method == "threshold" else loop.active
    for kind, unit in model.config.units.items():
        p, share = list(unit.threshold), list(unit.activation)
        for layer in range(n_layer):
            if unit.threshold[layer] > 0:
                p[layer] = model.router((layer, kind)).threshold
                share[layer] = activation[layer, kind]
        units[kind] = UnitConfig(tuple(p), tuple(share))
    training = {
        **config.to_dict(),
        "data": [Path(p).name for p in config.data],
        "held_out": figures,
    }
    if config.method == "topk":
        training["top_k"] = {kind: config.target_of(kind) for kind in units}
    record = {**model.config.calibration, "training": training}
    if config.parameters != "routers":
        record.pop(
            "model", None
        )  # with LoRA merged, or all weights trained, it is the original no more
    return replace(model.config, units=units, calibration=record).validate(n_layer)


def write(
    model: MoDModel, out: str, save_as: str, identity: dict, figures: dict, force: bool
) -> None:
    if save_as == "adapter":
        names = {
            "kl": "KL",
            "perplexity": "perplexity",
            "perplexity_dense": "of dense",
            "kv_share": "K/V of dense",
        }
        named = {name: f"{figures[key]:.4g}" for key, name in names.items()}
        adapter.save(out, model.config, model.router_tensors(), model.base, identity, named, force)
        return
    merge_lora(model.base)
    model.save(out, force=force)


def _data(model: MoDModel, config: TrainConfig) -> tuple[PackedData, PackedData]:
    longest = architectures.context_length(model.base) or config.length
    if config.length > longest:
        raise UserError(f"sequences of {config.length} tokens", f"the model's context is {longest}")
    window = model.config.kv_window
    if "kv" in model.config.units and config.length <= window:
        raise UserError(
            f"sequences of {config.length} tokens fit in the window of {window}: nothing is forgotten",
            f"use a --length well above {window}, or convert with a smaller --kv-window",
        )
    data = open_data(model.tokenizer, config.data, config.length, config.loss_on, config.limit)
    least = config.held_out + MIN_SEQUENCES
    if len(data) < least:
        raise UserError(
            f"data too short: {len(data)} sequences of {config.length} tokens",
            f"give at least {least}: more text, a larger --limit or a smaller --length",
        )
    return split(data, config.held_out)


def check_teacher(teacher, tokenizer, model: MoDModel, config: TrainConfig) -> None:
    """Raises UserError for a teacher whose tokens, or hidden states where they are compared, are
    others.
    """
    rows = [base.get_output_embeddings().weight.shape[0] for base in (teacher, model.base)]
    if not same_tokens(tokenizer, model.tokenizer):
        raise UserError(
            f"the teacher {config.teacher} has another tokenizer", "give a model of the same family"
        )
    if rows[0] != rows[1]:
        raise UserError(
            f"the teacher {config.teacher} has logits for {rows[0]} tokens, the model for {rows[1]}",
            "give a teacher with as many",
        )
    shapes = [
        f"{len(architectures.decoder_layers(base))} layers of {architectures.n_embd(base)}"
        for base in (teacher, model.base)
    ]
    if config.hidden_weight and shapes[0] != shapes[1]:
        raise UserError(
            f"the teacher has {shapes[0]}, the model {shapes[1]}",
            "leave out --hidden-weight, which compares them layer by layer",
        )


def _check(
    config: TrainConfig, out: Path, run: Path, save_as: str, resume: bool, force: bool
) -> None:
    """What can be known before minutes of work."""
    if save_as == "adapter" and config.parameters == "full":
        raise UserError(
            "all weights are trained, which no adapter holds",
            "train routers or lora, or save it merged",
        )
    check_dir(out, force, *([adapter.MOD_JSON] if save_as == "adapter" else []))
    if resume:
        checkpoints.load(run)
    elif (run / checkpoints.NAME).exists():
        if not force:
            raise UserError(
                f"{run} holds the checkpoint of a run",
                "go on with --resume, or use --force to replace it",
            )


def _is_trained(config) -> bool:
    """Whether a training has changed the base weights: see _config."""
    return "training" in config.calibration and "model" not in config.calibration


def clear(run: Path) -> None:
    """Remove what a former run left, once nothing is in the way of this one."""
    for name in (checkpoints.NAME, "metrics.jsonl", "loss.png", "units.png"):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
