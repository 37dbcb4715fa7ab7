"""The rounding of activations in llama.cpp, for a model that was read from a GGUF file.

llama.cpp multiplies a matrix of f16 by activations rounded to f16, and a quantised matrix by
activations rounded to 8 bits, in blocks as long as those of the matrix. So its logits are not those
of the dequantised weights, and how far they are off depends on the model. Source: vec_dot_type in
ggml/src/ggml-cpu/ggml-cpu.c.

    for tokens, logits, rounded_logits in batch_logits(model, file, ids, n_batch=64): ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from mod_export.formats.ggml_types import block_size, enum_name
from mod_export.formats.gguf import GGUFFile
from mod_export.model.gguf_reading import tensor_sources
from mod_export.model.layer_walk import LayerWalk

_ROUNDED_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16}


@torch.inference_mode()
def batch_logits(
    model: nn.Module, file: GGUFFile, ids: Sequence[int], n_batch: int
) -> Iterator[tuple[Sequence[int], torch.Tensor, torch.Tensor]]:
    """Yield the tokens of each batch, and their logits without and with the rounding.

    ids: one sequence, which is read n_batch tokens at a time. The logits are float32 [n, n_vocab].
    """
    sequence, types = torch.tensor(ids), _matrix_types(model, file)
    plain = LayerWalk(model, [sequence])
    with _rounded_activations(types):
        rounding = LayerWalk(model, [sequence])
    for _ in zip(plain.layers(), rounding.layers(), strict=True):  # both in one layer at a time
        plain.pass_layer(0)
        with _rounded_activations(types):
            rounding.pass_layer(0)
    for start in range(0, len(ids), n_batch):
        rows = slice(start, start + n_batch)
        logits = plain.logits(0, rows).float()
        with _rounded_activations(types):
            rounded_logits = rounding.logits(0, rows).float()
        yield ids[rows], logits, rounded_logits


def _matrix_types(model: nn.Module, file: GGUFFile) -> dict[nn.Module, int]:
    """Return the type of the file's first matrix of each module that multiplies by one."""
    values = model.state_dict(keep_vars=True)
    types = {
        values[name]: file.tensors[sources[0]].type
        for name, sources in tensor_sources(model, file).items()
        if sources
    }
    found = {}
    for module in model.modules():
        matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        if matrices and not isinstance(module, nn.Embedding):
            found[module] = types[matrices[0]]
    return found


@contextlib.contextmanager
def _rounded_activations(types: Mapping[nn.Module, int]) -> Iterator[None]:
    """Round what the matrices of modules, of these types, are multiplied by.

    Only the first input of the experts of a layer is rounded, not what lies between their matrices.
    """
    hooks = [
        module.register_forward_pre_hook(partial(_round, type)) for module, type in types.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _round(type: int, _module: nn.Module, inputs: tuple) -> tuple:
    return (rounded(inputs[0], type), *inputs[1:])


def rounded(x: torch.Tensor, type: int) -> torch.Tensor:
    """Round activations [..., n] as a matrix of this type needs them. type: enum ggml_type."""
    if (block := block_size(type)) > 1:
        blocks = x.unflatten(-1, (-1, block))
        scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return ((blocks / scale).round() * scale).flatten(-2)
    dtype = _ROUNDED_FLOATS.get(enum_name(type), x.dtype)
    return x.to(dtype).to(x.dtype)
