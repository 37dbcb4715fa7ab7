"""Whether the modules of a decoder layer do what the table of architectures says.

A model type that the table does not name is taken to have Llama's layers. This check runs such a
model on a few tokens and adds up what its layers do, so that a conversion refuses a model whose
layers are otherwise built.

    check_roles(base)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mod_export.model import architectures
from mod_export.model.layer_walk import LayerWalk
from mod_export.model.mod_model import MoDModel
from mod_export.model.routing import DecisionStrategy
from mod_export.units import ATTN, FFN, Unit

N_TOKENS = 8
TOLERANCE = 1e-3  # of the largest value


@torch.no_grad()
def check_roles(base: nn.Module) -> None:
    """Raise UserError unless attention and FFN of each layer add up to what the layer does.

    The FFN has to read what the attention leaves, or the layer's input, and the output has to be
    the input and what both add. Nothing is checked where a layer cannot have units of both.
    """
    model = MoDModel.from_base(base, None)
    ids = torch.arange(N_TOKENS, device=base.device)
    walk = LayerWalk(base, [ids])
    every = torch.ones_like(ids[None], dtype=torch.bool)
    try:
        for layer in walk.layers():
            part = walk.parts[layer]
            seen: dict[Unit, tuple[torch.Tensor, torch.Tensor]] = {}
            units = [Unit(layer, kind) for kind in (ATTN, FFN) if kind not in part.refused]
            strategy = DecisionStrategy(_noting(seen))
            with model.deciding(ids[None], layer, dict.fromkeys(units, every), strategy):
                out = walk.run(0)
            if not _adds_up(part, out, seen.get(Unit(layer, ATTN)), seen.get(Unit(layer, FFN))):
                raise architectures.unsupported(
                    base,
                    f"what attention and FFN of layer {layer} add is not what the layer does",
                )
            walk.keep(0, out)
    finally:
        model.detach()


def _noting(seen: dict) -> Callable:
    return lambda unit, h, delta: seen.update({unit: (h, delta)})


def _adds_up(part: architectures.LayerParts, out: torch.Tensor, attn, ffn) -> bool:
    """Return whether (input, delta) of attention and FFN, each [1, T, n_embd], give the output."""
    if ATTN in part.refused or FFN in part.refused:
        return True  # the layer does more than the two, and a row of the table says so
    if attn is None or ffn is None:  # a module ran where nobody expects it
        return False
    (h, by_attn), (h_ffn, by_ffn) = attn, ffn
    reads = h if part.ffn_entry is None else h + by_attn
    return _equal(h_ffn, reads) and _equal(out, h + by_attn + by_ffn)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
