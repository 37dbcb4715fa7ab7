"""What llama.cpp takes for granted in the file of a model.

llama.cpp ends the process where one of these does not hold: with a failed assertion when it runs
the model, or with a C++ exception while it tokenizes. Other assertions fail while the file is
opened, and runtime/assertions.py makes errors of them.

    check_model(GGUFFile.open("model.gguf"))     # UserError naming the key, tensor or token

Sources in llama.cpp: src/llama-vocab.cpp, src/llama-model.cpp, ops.cpp and binary-ops.cpp of
ggml/src/ggml-cpu.
"""

from __future__ import annotations

import math

from mod_export.errors import UserError
from mod_export.formats import ggml_types
from mod_export.formats.ggml_types import F32_TYPE
from mod_export.formats.gguf import GET_AGAIN, MAX_MODEL_NUMBER, GGUFFile, Strings
from mod_export.formats.rotary import FREQS, LONG, SHORT

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
TOKENS_KEY = "tokenizer.ggml.tokens"
SENTENCEPIECE = "llama"  # the name that tokenizer.ggml.model has for it
# ggml cannot multiply with these, and looks up rows of the last alone.
UNUSED_TYPES = ("I8", "I16", "I64", "F64", "Q8_1", "Q8_K", "I32")
ROW_TABLE = "ffn_gate_tid2eid.weight"
# ggml adds, multiplies and rotates with these in f32 only.
F32_ENDINGS = (
    "norm.weight",
    ".bias",
    FREQS,
    LONG,
    SHORT,
)


def check_model(file: GGUFFile) -> None:
    """Raise UserError for what is no model, and for what would end the process in llama.cpp."""
    if file.get("general.type") == "adapter":
        raise UserError(
            f"{file.path} is an adapter, and no model",
            "give the file of the model, and routers as --mod",
        )
    check_content(file)


def check_content(file: GGUFFile) -> None:
    """Raise UserError for what would end the process in llama.cpp, in models and adapters."""
    _check_numbers(file)
    _check_tensors(file)
    _check_vocabulary(file)


def _check_numbers(file: GGUFFile) -> None:
    arch = file.architecture
    limits = {
        "block_count": MAX_LAYERS,
        "vocab_size": MAX_MODEL_NUMBER,
        "context_length": MAX_MODEL_NUMBER,  # llama_cpp makes a list so long for each text
    }
    for name, largest in limits.items():
        value = file.get(f"{arch}.{name}", 1)
        if not isinstance(value, int) or not 1 <= value <= largest:
            raise UserError(
                f"{file.path}: key {arch}.{name} is {_shown(value)}, not a number from 1 to "
                f"{largest}",
                GET_AGAIN,
            )
    for name, key in file.keys.items():
        if name.startswith(f"{arch}.attention.") and name.endswith("epsilon"):
            value = key.value
            if not isinstance(value, float) or not math.isfinite(value) or value < 0:
                raise UserError(
                    f"{file.path}: key {name} is {_shown(value)}, not a small positive number",
                    GET_AGAIN,
                )


def _check_tensors(file: GGUFFile) -> None:
    for tensor in file.tensors.values():
        if tensor.type == F32_TYPE:
            continue
        type = ggml_types.enum_name(tensor.type)
        needed = "F32" if tensor.name.endswith(F32_ENDINGS) else "a type of weights"
        if needed == "F32" or type in UNUSED_TYPES and not tensor.name.endswith(ROW_TABLE):
            raise UserError(
                f"{file.path}: tensor {tensor.name} is {type}, llama.cpp needs {needed}", GET_AGAIN
            )


def _check_vocabulary(file: GGUFFile) -> None:
    tokens = file.get(TOKENS_KEY)
    if not isinstance(tokens, Strings):
        return  # llama.cpp refuses the file, or needs no tokens
    texts = _texts(tokens)
    known = set(texts)
    if len(known) < len(texts):
        first, second = _same(texts)
        text = texts[first].decode("utf-8", "replace")
        raise UserError(
            f"{file.path}: tokens {first} and {second} of the vocabulary are both {text!r}",
            GET_AGAIN,
        )
    if file.get("tokenizer.ggml.model") == SENTENCEPIECE:
        for byte in range(256):
            if b"<0x%02X>" % byte not in known and bytes([byte]) not in known:
                raise UserError(
                    f"{file.path}: the vocabulary has no token <0x{byte:02X}>, which texts need",
                    GET_AGAIN,
                )


def _texts(tokens: Strings) -> list[bytes]:
    """The texts that llama.cpp gives the tokens: cut at a zero byte, and no text is empty."""
    texts = tokens.raw()
    if b"\0" in b"".join(texts):
        texts = [text.partition(b"\0")[0] for text in texts]
    if b"" in texts:
        texts = [text or b"[EMPTY_%d]" % number for number, text in enumerate(texts)]
    return texts


def _same(texts: list[bytes]) -> tuple[int, int]:
    """The numbers of the first two tokens with one text."""
    seen: dict[bytes, int] = {}
    for number, text in enumerate(texts):
        if text in seen:
            return seen[text], number
        seen[text] = number
    raise ValueError("no two are the same")


def _shown(value: object) -> str:
    """A value, short enough for a line."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
