"""The devices of a training run: where it runs, its types, and parameters in pieces.

    device = choose("cuda:1", processes=1)
    name = autocast("auto", device)          # one of Accelerate's names: no, bf16, fp16
    bf16_slowdown()                          # 7.3 on a CPU that has no instructions for bf16

Parameters can lie in pieces over the devices: FSDP2, which Accelerate applies to each decoder
layer.

    accelerate launch --use_fsdp --fsdp_version 2 \\
        --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP -m mod_export train ...

A parameter in pieces is whole only while a forward of the prepared module (student.Student) runs.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from mod_export.errors import UserError
from mod_export.model.devices import choose_dtype, parse_device
from mod_export.training.config import TrainConfig


def choose(name: str | None, processes: int) -> torch.device:
    """Return the device of that name; None is the GPU where torch finds one, else the CPU.

    Raises UserError for a device that is not there, and for one GPU with several processes.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = parse_device(name)
    if device.index is not None:
        if processes > 1:
            raise UserError(
                f"{processes} processes cannot share {name}",
                f"use --device {device.type}: each process takes a GPU of its own",
            )
        torch.cuda.set_device(device)  # the one that Accelerate takes
    return device


def autocast(name: str, device: torch.device) -> str:
    """Return Accelerate's name of a precision; `auto` is bf16 where a CUDA device has it, else no.

    Raises UserError for fp16 on a CPU, where Accelerate would say nothing and train in float32.
    """
    if name == "auto":
        is_cuda = device.type == "cuda"
        return (
            "bf16" if is_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
        )
    if name == "fp16" and device.type == "cpu":
        raise UserError("fp16 needs a GPU", "use --precision no")
    return name


def weights_type(
    config: TrainConfig, stored: str, device: torch.device, precision: str
) -> torch.dtype:
    """Return the type of the weights that are not trained.

    stored: what the files have, as loading.stored_type names it. precision: of autocast. Raises
    UserError where gradients would be lost in float16.
    """
    if config.parameters == "full":
        return torch.float32
    dtype = choose_dtype(config.dtype, "quantised" if config.four_bit else stored, device)
    if dtype == torch.float16 and precision == "no":
        if config.dtype == "auto":
            return torch.float32
        raise UserError(
            "gradients of float16 are lost without a scale",
            "use --precision fp16" if device.type == "cuda" else "use --dtype bfloat16",
        )
    return dtype


def check_four_bit(config: TrainConfig, accelerator) -> None:
    """Raise UserError where weights in 4 bits cannot be."""
    if not config.four_bit:
        return
    if accelerator.device.type != "cuda":
        raise UserError(
            f"--four-bit needs a GPU with CUDA, and the device is {accelerator.device}",
            "use --dtype bfloat16",
        )
    if is_sharded(accelerator):
        raise UserError("weights of 4 bits cannot lie in pieces", "leave out --four-bit")


def bf16_slowdown() -> float:
    """Return the time of a product of matrices in bf16 over that in float32, on this CPU.

    The ratio is below 1 where the CPU has instructions for bf16. Other CPUs convert every number,
    and can be many times slower.
    """
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(128, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times[dtype] = min(_seconds(x, weight) for _ in range(4))  # the first one prepares
    return times[torch.bfloat16] / times[torch.float32]


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    begin = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    return time.perf_counter() - begin


def configure(accelerator) -> None:
    """Set up FSDP2, before `prepare` of Accelerate.

    Raises UserError for FSDP1, which has no parameters of a module's own to gather.
    """
    if is_sharded(accelerator):
        if not accelerator.is_fsdp2:
            raise UserError("FSDP1 is not supported", "launch it with --fsdp_version 2")
        # Pieces are put together in their own type: routers are float32, and autocast rounds the
        # rest as on one device.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None


def is_sharded(accelerator) -> bool:
    from accelerate import DistributedType

    return accelerator.distributed_type == DistributedType.FSDP


def gather(module: nn.Module, keep: bool) -> None:
    """Put whole parameters in the place of pieces, on the CPU, where `keep` is set.

    Every process has to call it.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for part in module.modules():
        if isinstance(part, FSDPModule):
            # The next state_dict() would take away what is still whole after the last forward.
            part.reshard()
    whole: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for part in module.modules():
        for name, piece in part._parameters.items():
            if isinstance(piece, DTensor) and id(piece) not in whole:
                tensor = piece.detach().full_tensor().cpu()
                whole[id(piece)] = nn.Parameter(tensor, piece.requires_grad) if keep else piece
            if id(piece) in whole:
                part._parameters[name] = whole[id(piece)]
    if whole and keep:
        for part in module.modules():
            part._buffers.update({k: v if v is None else v.cpu() for k, v in part._buffers.items()})


def number(x: float | torch.Tensor) -> float:
    """Return a scalar that may be in pieces, such as the norm of gradients.

    Every process has to call it.
    """
    return float(x.full_tensor() if hasattr(x, "full_tensor") else x)
