"""Replace the attention of a transformers model for a while.

Every model calls the attention function that its configuration names, after it has applied its
position encoding. So one registered function serves every architecture. Training reads biases of
keys there (training/relaxation.py), and calibration reads queries, keys and values
(calibration/layer_hooks.py).

    with replaced_attention(base, "mod_relaxed", function):
        base(input_ids)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def replaced_attention(base: nn.Module, name: str, function: Callable) -> Iterator[None]:
    """Let `base` call `function` as its attention within the context.

    name: of the function in the registry of transformers. The function takes (module, query, key,
    value, attention_mask, scaling=None, **kwargs) and returns (output, weights). The masks that the
    model makes are those of SDPA: boolean, or None for a causal mask.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    before = base.config._attn_implementation
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def has_attention(base: nn.Module, name: str) -> bool:
    """Return whether the attention of `base` is the registered function of that name."""
    return base.config._attn_implementation == name
