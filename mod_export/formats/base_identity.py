"""Which model an adapter was made for, and whether another file holds the same one.

Quantisation changes every weight, so a hash of them could only tell equal from unequal. A few
numbers of the weights
tell more: how far two copies are apart. Knows nothing of torch.

    identity = base_identity(base, tokenizer, "SmolLM2-135M-Instruct")   # a dict, as it stands in mod.json
    distance = compare(identity, gguf_identity(GGUFFile.open("model-Q4_K_M.gguf")))
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np

from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile

SAMPLE = (8, 16)  # rows and columns of a matrix, spread evenly
ROUNDING = 0.004  # relative distance that bf16 explains (0.0014); q8_0 has 0.006
UNRELATED = 0.7  # q2_K has 0.33, two models that know nothing of each other 1.4
_FIELDS = {
    "name": str,
    "model_type": str,
    "n_layer": int,
    "n_embd": int,
    "n_vocab": int,
    "tokenizer": str,
    "weights": dict,
}
_AGAIN = "get the adapter again"
_CURE = "give the model that it was made for"


def base_identity(base, tokenizer, name: str) -> dict:
    """Identity of a torch model as it is now: take it before training changes weights or LoRA is
    injected.

    weights: {matrix: [8 * 16 numbers]} of the input embedding and of one FFN matrix in the middle.
    """
    from mod_export.model import architectures

    parts, embedding = architectures.decoder_layers(base), base.get_input_embeddings().weight
    matrices = {"embedding": embedding}
    if ffn := _linears(parts[len(parts) // 2].ffn):
        matrices["ffn"] = ffn[-1].weight
    tokens = (
        {}
        if tokenizer is None
        else {number: token for token, number in tokenizer.get_vocab().items()}
    )
    return {
        "name": name,
        "model_type": base.config.model_type,
        "n_layer": len(parts),
        "n_embd": architectures.n_embd(base),
        "n_vocab": len(embedding),
        "tokenizer": _hash(tokens),
        "weights": {
            key: _sample(
                tuple(matrix.shape),
                lambda i, matrix=matrix: matrix[i].detach().float().cpu().numpy(),
            )
            for key, matrix in matrices.items()
        },
    }


def gguf_identity(file: GGUFFile) -> dict:
    """The same of a GGUF, without the FFN. Raises UserError for keys that are missing."""
    from mod_export.inspection import model_number

    tokens = file.get("tokenizer.ggml.tokens", [])
    embedding = file.tensors.get("token_embd.weight")
    shape = embedding.shape[::-1] if embedding and len(embedding.shape) == 2 else (0, 0)
    return {
        "name": str(file.path),
        "model_type": file.architecture,
        "n_layer": model_number(file, "block_count"),
        "n_embd": model_number(file, "embedding_length"),
        "n_vocab": shape[0],
        "tokenizer": _hash(dict(enumerate(tokens))),
        "weights": _gguf_sample(embedding, shape),
    }


def check(data: object, where: str) -> dict:
    """`data` where it is an identity. Raises UserError naming the key that is wrong."""
    if not isinstance(data, dict) or set(data) != set(_FIELDS):
        raise UserError(
            f"{where}: base is not an object with the keys {', '.join(_FIELDS)}", _AGAIN
        )
    for key, kind in _FIELDS.items():
        if type(data[key]) is not kind or (kind is int and not 1 <= data[key] < 2**32):
            raise UserError(f"{where}: base.{key} is {data[key]!r:.40}", _AGAIN)
    for key, values in data["weights"].items():
        good = isinstance(values, list) and len(values) == math.prod(SAMPLE)
        if not good or not all(
            type(value) in (int, float) and math.isfinite(value) for value in values
        ):
            raise UserError(
                f"{where}: base.weights.{key} is no list of {math.prod(SAMPLE)} numbers", _AGAIN
            )
    return data


def compare(expected: dict, actual: dict) -> float:
    """Relative distance between the weights of two copies of one model, 0 where none are known.

    Raises UserError naming what differs where they are two models.
    """
    adapter, model = f"the adapter is for {expected['name']}", actual["name"]
    for key in ("n_layer", "n_embd", "n_vocab"):
        if expected[key] != actual[key]:
            raise UserError(
                f"{adapter} with {key} {expected[key]}, {model} has {actual[key]}", _CURE
            )
    if (
        expected["tokenizer"]
        and actual["tokenizer"]
        and expected["tokenizer"] != actual["tokenizer"]
    ):
        raise UserError(f"{adapter}, {model} has another tokenizer", _CURE)
    common = expected["weights"].keys() & actual["weights"].keys()
    distance = max(
        (_distance(expected["weights"][key], actual["weights"][key]) for key in common), default=0.0
    )
    if not distance < UNRELATED:  # written so that NaN fails too
        raise UserError(f"{adapter}, {model} of the same shape has other weights", _CURE)
    return distance


def _linears(module) -> list:
    from torch import nn

    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _hash(tokens: dict[int, str]) -> str:
    """Of the vocabulary; '' where there is none. llama.cpp's converter fills gaps with [PAD5],
    these do not count.
    """
    lines = [
        f"{number} {tokens[number]}"
        for number in sorted(tokens)
        if tokens[number] != f"[PAD{number}]"
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32] if lines else ""


def _sample(shape: tuple[int, int], row: Callable[[int], np.ndarray]) -> list[float]:
    """Numbers of a matrix, four digits each; row(i): its row i."""
    rows, columns = (
        [(2 * i + 1) * size // (2 * count) for i in range(count)]
        for size, count in zip(shape, SAMPLE, strict=True)
    )
    return [float(f"{value:.4g}") for i in rows for value in row(i)[columns]]


def _gguf_sample(tensor, shape: tuple[int, int]) -> dict[str, list[float]]:
    from gguf.constants import GGMLQuantizationType

    from mod_export.formats.ggml_types import dequantize

    if not all(shape):
        return {}
    data, type = (
        np.frombuffer(tensor.data, np.uint8).reshape(shape[0], -1),
        GGMLQuantizationType(tensor.type),
    )
    try:
        return {"embedding": _sample(shape, lambda i: dequantize(data[i : i + 1], type)[0])}
    except NotImplementedError:  # a type that gguf-py cannot read
        return {}


def _distance(expected: list[float], actual: list[float]) -> float:
    a, b = np.array(expected), np.array(actual)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-30))
