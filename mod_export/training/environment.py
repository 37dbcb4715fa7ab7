"""What environment variables may ask of a training run.

`accelerate launch` hands its options on in variables, which Accelerator() reads. A forgotten line
of a shell's start-up file sets them too. What a run does not do is refused by the variable's
name, so that no result depends on a variable in silence. The table is in
docs/reference/environment.md.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from mod_export.errors import UserError

OFF = ("", "0", "n", "no", "f", "false", "off", "none")
UNSET = "unset it"
# What a run refuses: variable -> what it asks for, and the cure.
REFUSED = {
    "ACCELERATE_DYNAMO_BACKEND": ("compiling with TorchDynamo", UNSET),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "launch with --use_fsdp --fsdp_version 2"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "launch with --use_fsdp --fsdp_version 2"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("tensor or context parallelism", UNSET),
    "ACCELERATE_USE_SAGEMAKER": ("SageMaker's launcher", UNSET),
    "ACCELERATE_TORCH_DEVICE": ("a device by name", "choose with --device"),
}
# The same for runs whose parameters are to lie in pieces (ACCELERATE_USE_FSDP).
REFUSED_OF_FSDP = {
    "FSDP_ACTIVATION_CHECKPOINTING": ("checkpoints of activations", "use --recompute instead"),
    "FSDP_OFFLOAD_PARAMS": ("parameters in the memory of the CPU", UNSET),
}
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
PRECISION = "ACCELERATE_MIXED_PRECISION"
# Variables of launchers: the number of processes, and which of them this is.
RANKS = {
    "WORLD_SIZE": "RANK",
    "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
}
DISTRIBUTED_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")


def check(variables: MutableMapping[str, str], precision: str) -> None:
    """Raise UserError for a variable that asks for what a run does not do.

    precision: the type of autocast of the run. Where parameters are to lie in pieces, each process
    is told to load the whole model: transformers would load it on the first process only.
    """
    refused = dict(REFUSED)
    if is_on(variables, "ACCELERATE_USE_FSDP"):
        refused |= REFUSED_OF_FSDP
        variables["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    for name, (what, cure) in refused.items():
        if is_on(variables, name):
            raise UserError(f"{name}={variables[name]}: train does not support {what}", cure)
    if (steps := variables.get(ACCUMULATION) or "1") != "1":
        raise UserError(
            f"train does not read {ACCUMULATION}={steps}",
            f"leave it out of the launcher's options, and use --accumulate {steps}",
        )
    asked = variables.get(PRECISION, "").lower()
    if asked not in (*OFF, precision):
        raise UserError(
            f"{PRECISION}={asked}, and the run has {precision}",
            "unset it, and choose with --precision",
        )
    _check_ranks(variables)


def is_on(variables: Mapping[str, str], name: str) -> bool:
    """Return whether a variable is set, to something else than no."""
    return variables.get(name, "").strip().lower() not in OFF


def processes(variables: Mapping[str, str]) -> int:
    """Return how many processes a launcher has started, 1 without a launcher."""
    sizes = (variables.get(size, "") for size in RANKS)
    return next((int(size) for size in sizes if size.isdecimal()), 1)


def _check_ranks(variables: Mapping[str, str]) -> None:
    """Check the variables of launchers.

    Raise UserError where a variable says that there are several processes and none says which one
    this is.
    """
    for size, rank in RANKS.items():
        if variables.get(size, "1") != "1" and rank not in variables:
            raise UserError(
                f"{size}={variables[size]} without {rank}: train would wait for other processes",
                f"unset {size}, or start all processes with `accelerate launch`",
            )
    if variables.get("LOCAL_RANK", "-1") != "-1" and "RANK" not in variables:
        raise UserError(
            f"LOCAL_RANK={variables['LOCAL_RANK']} without RANK: train would be one of several "
            "processes",
            "unset LOCAL_RANK, or start all processes with `accelerate launch`",
        )


def check_made(accelerator: Any) -> None:
    """Raise UserError where Accelerate has set up more than a run knows of."""
    kind = accelerator.distributed_type.value
    if kind not in DISTRIBUTED_TYPES:
        raise UserError(
            f"Accelerate has set up {kind}, which train does not support",
            "unset Accelerate's variables (env | grep ACCELERATE)",
        )
