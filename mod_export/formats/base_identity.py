"""Which model an adapter was made for, and whether another file holds the same model.

Quantisation changes every weight, so a hash could only tell equal weights from unequal ones. A few
numbers out of the weights tell more: how far two copies are apart. adapter.base_identity makes the
same record of a torch model.

    distance = compare(found.base, gguf_identity(GGUFFile.open("model-Q4_K_M.gguf")))
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np

from mod_export.errors import UserError
from mod_export.formats import ggml_types
from mod_export.formats.gguf import GGUFFile, Tensor
from mod_export.formats.sliding_windows import main_layers

SAMPLE_SHAPE = (8, 16)  # rows and columns of a matrix, spread evenly
SAMPLE_SIZE = math.prod(SAMPLE_SHAPE)
ROUNDING_DISTANCE = 0.004  # more than bf16 explains (0.0014); q8_0 has 0.006
UNRELATED_DISTANCE = 0.7  # q2_K has 0.33, two models that know nothing of each other have 1.4
# The record has these fields in mod.json.
FIELD_TYPES = {
    "name": str,
    "model_type": str,
    "n_layer": int,
    "n_embd": int,
    "n_vocab": int,
    "tokenizer": str,
    "weights": dict,
}
ADAPTER_AGAIN = "get the adapter again"
RIGHT_MODEL = "give the model that it was made for"


def gguf_identity(file: GGUFFile) -> dict:
    """The identity of a GGUF, without an FFN matrix. Raises UserError for keys that are missing."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) != 2:
        embedding = None
    values = sample(embedding) if embedding is not None else []
    return {
        "name": str(file.path),
        "model_type": file.architecture,
        "n_layer": main_layers(file),
        "n_embd": file.model_number("embedding_length"),
        "n_vocab": embedding.shape[1] if embedding is not None else 0,
        "tokenizer": vocabulary_hash(dict(enumerate(file.get("tokenizer.ggml.tokens", [])))),
        "weights": {"embedding": values} if values else {},
    }


def check(data: object, where: str) -> dict:
    """`data` where it is an identity. Raises UserError naming the key that is wrong."""
    if not isinstance(data, dict) or set(data) != set(FIELD_TYPES):
        raise UserError(
            f"{where}: base is not an object with the keys {', '.join(FIELD_TYPES)}", ADAPTER_AGAIN
        )
    for key, kind in FIELD_TYPES.items():
        if type(data[key]) is not kind or (kind is int and not 1 <= data[key] < 2**32):
            raise UserError(f"{where}: base.{key} is {data[key]!r:.40}", ADAPTER_AGAIN)
    for key, values in data["weights"].items():
        if not _is_sample(values):
            raise UserError(
                f"{where}: base.weights.{key} is no list of {SAMPLE_SIZE} numbers", ADAPTER_AGAIN
            )
    return data


def _is_sample(values: object) -> bool:
    if not isinstance(values, list) or len(values) != SAMPLE_SIZE:
        return False
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


def compare(expected: dict, actual: dict) -> float:
    """Relative distance between the weights of two copies of one model, 0 where none are known.

    expected: of the adapter. Raises UserError naming what differs where they are two models.
    """
    adapter = f"the adapter is for {expected['name']}"
    model = actual["name"]
    for key in ("n_layer", "n_embd", "n_vocab"):
        if expected[key] != actual[key]:
            raise UserError(
                f"{adapter} with {key} {expected[key]}, {model} has {actual[key]}", RIGHT_MODEL
            )
    hashes = expected["tokenizer"], actual["tokenizer"]
    if all(hashes) and hashes[0] != hashes[1]:
        raise UserError(f"{adapter}, {model} has another tokenizer", RIGHT_MODEL)
    distances = [
        distance(expected["weights"][key], actual["weights"][key])
        for key in expected["weights"].keys() & actual["weights"].keys()
    ]
    largest = max(distances, default=0.0)
    if not largest < UNRELATED_DISTANCE:  # written so that NaN fails too
        raise UserError(f"{adapter}, {model} of the same shape has other weights", RIGHT_MODEL)
    return largest


def distance(expected: list[float], actual: list[float]) -> float:
    """How far samples of two matrices are apart: 0 where they are equal, about 1.4 for others."""
    a = np.array(expected)
    b = np.array(actual)
    length = max(float(np.linalg.norm(a)), 1e-30)
    return float(np.linalg.norm(a - b)) / length


def vocabulary_hash(tokens: dict[int, str]) -> str:
    """Hash of a vocabulary, number -> token; '' where there is none.

    llama.cpp's converter fills gaps with tokens such as [PAD5]; these tokens do not count.
    """
    lines = [
        f"{number} {tokens[number]}"
        for number in sorted(tokens)
        if tokens[number] != f"[PAD{number}]"
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32] if lines else ""


def sample_matrix(shape: tuple[int, int], row: Callable[[int], np.ndarray]) -> list[float]:
    """SAMPLE_SIZE numbers of a matrix, four digits each; row(i): row i of the matrix."""
    rows = _spread(shape[0], SAMPLE_SHAPE[0])
    columns = _spread(shape[1], SAMPLE_SHAPE[1])
    return [float(f"{value:.4g}") for i in rows for value in row(i)[columns]]


def _spread(size: int, count: int) -> list[int]:
    """`count` indices below `size`, at even distances."""
    return [(2 * i + 1) * size // (2 * count) for i in range(count)]


def sample(tensor: Tensor) -> list[float]:
    """The numbers of a GGUF's matrix, none where gguf-py cannot read its type."""
    from gguf.constants import GGMLQuantizationType

    columns, rows = tensor.shape
    if not (rows and columns):
        return []
    data = np.frombuffer(tensor.data, np.uint8).reshape(rows, -1)
    type = GGMLQuantizationType(tensor.type)

    def row(i: int) -> np.ndarray:
        return ggml_types.dequantize(data[i : i + 1], type)[0]

    try:
        return sample_matrix((rows, columns), row)
    except NotImplementedError:
        return []
