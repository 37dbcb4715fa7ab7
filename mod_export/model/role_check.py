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
            seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
            units = [Unit(layer, kind) for kind in (ATTN, FFN) if kind not in part.refused]
            strategy = DecisionStrategy(_noting(seen))
            with model.deciding(ids[None], layer, dict.fromkeys(units, every), strategy):
                out = walk.run(0)
            if not _adds_up(part, walk.h(0), out, seen):
                raise architectures.unsupported(
                    base,
                    f"what attention and FFN of layer {layer} add is not what the layer does",
                )
            walk.keep(0, out)
    finally:
        model.detach()


def _noting(seen: dict) -> Callable:
    return lambda unit, h, delta: seen.update({unit[1]: (h, delta)})


def _adds_up(
    part: architectures.LayerParts, h: torch.Tensor, out: torch.Tensor, seen: dict
) -> bool:
    """Return whether what the modules add gives the layer's output; h, out: [1, T, n_embd].

    seen: kind -> (input, delta) of ATTN, which a module with a recurrent state may stand for, and
    of FFN.
    """
    if ATTN in part.refused or FFN in part.refused:
        return True  # the layer does more than the two, and a row of the table says so
    modules = {ATTN: part.attn, FFN: part.ffn}
    total = h
    for kind in (kind for kind, module in modules.items() if module is not None):
        if kind not in seen:  # a module ran where nobody expects it
            return False
        reads, added = seen[kind]
        if not _equal(reads, h if kind == FFN and part.ffn_entry is None else total):
            return False
        total = total + added
    return _equal(out, total)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
