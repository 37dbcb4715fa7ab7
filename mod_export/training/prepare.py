"""Prepare a training run: what is trained, the teacher, the optimizer, the controller."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mod_export.common.progress import stage
from mod_export.data.packing import PackedData
from mod_export.data.text import same_tokens
from mod_export.errors import UserError
from mod_export.model import architectures, loading
from mod_export.model.lora import inject_lora
from mod_export.model.mod_model import MoDModel
from mod_export.model.routing import DecisionStrategy
from mod_export.training import devices, steady_router
from mod_export.training.config import TrainConfig
from mod_export.training.controller import Controller, groups_of
from mod_export.training.loop import Setup
from mod_export.training.relaxation import Relaxation
from mod_export.training.student import LossWeights, Student

logger = logging.getLogger(__name__)

# Learning rate of a bias over that of weights. A bias moves its unit's activation, weights tell
# tokens apart.
BIAS_RATE = 20.0
# A unit that is always active has this logit, one that is never active the negative.
STATIC_LOGIT = 8.0


@dataclass(frozen=True)
class Source:
    """What a run starts from.

    directory: what holds the weights, a directory or a GGUF file. identity: of its base model.
    train, held_out: sequences.
    """

    directory: str
    model: MoDModel
    identity: dict
    train: PackedData
    held_out: PackedData


def prepare(source: Source, config: TrainConfig, accelerator: Any, run: Path) -> Setup:
    """Choose what is trained, make what the loop needs, and give it to Accelerate.

    Raises UserError for a teacher that does not fit the model.
    """
    model = source.model
    model.strategy = DecisionStrategy()  # not that of a baseline; the loop sets a baseline's own
    steady_router.install(model)
    teacher = load_teacher(source, config)
    units = model.config.routed()
    groups = groups_of(units, config.per_layer)
    student = Student(
        model,
        teacher,
        [[units.index(unit) for unit in group] for group in groups],
        LossWeights(config.kl_weight, config.hidden_weight, config.lm_weight),
        Relaxation(config.temperature),
        config.recompute,
    )
    # Whatever --dtype the base weights have, routers and LoRA are float32.
    parameters = trained(model, config)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    devices.configure(accelerator)
    student, optimizer = accelerator.prepare(student, optimizer)
    identity = {
        "options": config.fixed(),
        "base": source.identity,
        "data": source.train.fingerprint,
        "mod": replace(model.config, calibration={}).to_dict(),
        "processes": accelerator.num_processes,
    }
    return Setup(
        config,
        accelerator,
        student,
        optimizer,
        controller(groups, config, accelerator.num_processes),
        source.train,
        source.held_out,
        run,
        identity,
    )


def load_teacher(source: Source, config: TrainConfig):
    """Return the frozen teacher, or None where the model itself is one.

    The figures on held-out text are against the original in any case.
    """
    if not config.teacher and config.parameters != "full":
        return None
    name = config.teacher or source.directory
    logger.info(f"loading the teacher {name}")
    with stage("loading the teacher"):
        teacher, tokenizer = loading.load(name, source.model.base.dtype)
    teacher.requires_grad_(False)
    check_teacher(teacher, tokenizer, source.model, config)
    return teacher


def controller(groups: list[list], config: TrainConfig, processes: int) -> Controller:
    """Return the controller of the groups' activation."""
    return Controller(
        groups,
        targets=[config.target_of(group[0][1]) for group in groups],
        starts=[config.start_of(group[0][1]) for group in groups],
        anneal=round(config.anneal * config.steps(processes)),
        fixed=config.load if config.method == "threshold" else 0.0,
    )


def trained(model: MoDModel, config: TrainConfig) -> list[dict]:
    """Freeze everything, then free what is trained.

    Returns the optimizer's groups, each with its learning rate.
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
    """Make the static baseline: units that are always active, or never.

    Of each kind the units with the highest activation so far are the active ones.
    """
    for kind, units in model.config.by_kind().items():
        by_use = sorted(units, key=lambda unit: -model.config.activation(unit))
        kept = set(by_use[: round(targets[kind] * len(units))])
        for unit in units:
            router = model.router(unit)
            router.threshold = 0.5
            router.weight.data.zero_()
            router.bias.data.fill_(STATIC_LOGIT if unit in kept else -STATIC_LOGIT)


def check_teacher(teacher, tokenizer, model: MoDModel, config: TrainConfig) -> None:
    """Raise UserError for a teacher with other tokens.

    The same holds for other hidden states, where they are compared.
    """
    rows = [base.get_output_embeddings().weight.shape[0] for base in (teacher, model.base)]
    if not same_tokens(tokenizer, model.tokenizer):
        raise UserError(
            f"the teacher {config.teacher} has another tokenizer", "give a model of the same family"
        )
    if rows[0] != rows[1]:
        raise UserError(
            f"the teacher {config.teacher} has logits for {rows[0]} tokens, "
            f"the model for {rows[1]}",
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
