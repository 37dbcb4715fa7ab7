"""Training with the parameters in pieces over the devices: FSDP2, which Accelerate applies to each
decoder layer.

    accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP -m
    mod_export train ...

A piece is whole only while a forward of the prepared module (train_step.Student) runs.
"""

from __future__ import annotations

import torch
from torch import nn

from mod_export.errors import UserError


def configure(accelerator) -> None:
    """Before `prepare`. Raises UserError for FSDP1, which has no parameters of a module's own to
    gather.
    """
    if is_sharded(accelerator):
        if not accelerator.is_fsdp2:
            raise UserError("FSDP1 is not supported", "launch it with --fsdp_version 2")
        # pieces are put together in their own type: routers are float32, and autocast rounds the
        # rest as on one device
        accelerator.state.fsdp_plugin.mixed_precision_policy = None


def is_sharded(accelerator) -> bool:
    from accelerate import DistributedType

    return accelerator.distributed_type == DistributedType.FSDP


def gather(module: nn.Module, keep: bool) -> None:
    """Put whole parameters in the place of pieces, on the CPU, where `keep` is set; every process
    has to call it.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for part in module.modules():
        if isinstance(part, FSDPModule):
            # what is still whole after the last forward would be taken away by the next
            # state_dict()
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
    """A scalar that may be in pieces, such as the norm of gradients; every process has to call it."""
    return float(x.full_tensor() if hasattr(x, "full_tensor") else x)
