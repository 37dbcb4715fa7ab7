"""Weights that are not trained, in 4 bits: the matrices of the decoder layers.

They are in NF4 of bitsandbytes, whose scales are quantised too (QLoRA, arXiv 2305.14314). A product
restores its matrix in the type of the input, and hands gradients to the input.

    to_four_bit(base, device)       # before the layers are wrapped, and before LoRA
"""

from __future__ import annotations

import torch
from torch import nn

from mod_export.model import architectures


def to_four_bit(base: nn.Module, device: torch.device) -> None:
    """Quantise the linear modules of the decoder layers, one after the other, on the device."""
    for part in architectures.decoder_layers(base):
        for parent in list(part.layer.modules()):
            for name, module in list(parent.named_children()):
                if type(module) is nn.Linear:
                    setattr(parent, name, _quantised(module, device))


def _quantised(linear: nn.Linear, device: torch.device) -> nn.Linear:
    from bitsandbytes.nn import Linear4bit, Params4bit

    made = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    made.weight = Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
    made.bias = linear.bias
    return made.to(device)  # which quantises
