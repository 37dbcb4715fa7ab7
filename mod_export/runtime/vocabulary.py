"""The tokenizer of a GGUF file as llama.cpp reads it, without the weights.

with Vocabulary("model.gguf") as vocabulary:
    vocabulary.encode("Hello")
check_tokenizer(Path("model.gguf"), tokenizer, "convert the Hugging Face directory instead")
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mod_export.data.probe_texts import PROBE_TEXTS, difference, special_texts
from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile
from mod_export.runtime.assertions import AssertionFailure, guarded
from mod_export.runtime.log import check_file, kept_log, load_error, reason

import llama_cpp  # isort: skip
from llama_cpp import _internals  # isort: skip

NAMED_TYPES = (3, 4)  # tokenizer.ggml.token_type of control tokens and of those a user defined


class Vocabulary:
    """The vocabulary of a GGUF file in llama.cpp; close it after use.

    Raises UserError where llama.cpp refuses the file.
    """

    def __init__(self, path: str | os.PathLike):
        check_file(path)
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        with kept_log() as log:
            try:
                self._model = _internals.LlamaModel(
                    path_model=str(path), params=params, verbose=False
                )
            except ValueError as exc:
                raise UserError(f"cannot read the vocabulary of {path}: {reason(log)}") from exc

    def __enter__(self) -> Vocabulary:
        return self

    def __exit__(self, *_) -> None:
        self._model.close()

    def encode(self, text: str, names: bool = False) -> list[int]:
        """Return the ids of a text, with BOS and EOS where the file asks for them.

        names: the names of control tokens stand for these.
        """
        with kept_log():  # llama.cpp warns of a BOS token that the text names itself
            return self._model.tokenize(text.encode(), True, names)

    def ends(self, token: int) -> bool:
        """Return whether an answer ends with this token."""
        return llama_cpp.llama_vocab_is_eog(self._model.vocab, token)


def unknown_ends(path: Path, ends: Iterable[int]) -> list[int]:
    """Return those of the tokens `ends` with which an answer of a GGUF file does not end."""
    with Vocabulary(path) as vocabulary:
        return [token for token in ends if not vocabulary.ends(token)]


def check_tokenizer(path: Path, tokenizer, cure: str, name: str = "") -> None:
    """Raise UserError where a tokenizer of transformers gives other ids than llama.cpp on a file.

    name: what the message calls the file, by default its name.

    They are compared on fixed texts, and on the names of the file's control tokens. Where llama.cpp
    refuses the file, or one of its assertions fails on a text, that is a UserError too.
    """
    file = GGUFFile.open(path)
    tokens = list(file.get("tokenizer.ggml.tokens", ()))
    types = file.get("tokenizer.ggml.token_type", ())
    names = [t for t, type in zip(tokens, types, strict=False) if type in NAMED_TYPES and t]

    def ours(text: str) -> list[int]:
        return tokenizer(text).input_ids

    def first_difference():
        with Vocabulary(path) as vocabulary:
            return difference(ours, vocabulary.encode, PROBE_TEXTS) or difference(
                ours, lambda text: vocabulary.encode(text, names=True), special_texts(names)
            )

    try:
        found = guarded(first_difference)
    except AssertionFailure as exc:
        raise load_error(path, 0, exc, []) from exc
    if found is not None:
        raise UserError(
            f"transformers and llama.cpp cut texts differently with the tokenizer of "
            f"{name or path.name}: {found.show(tokens)}",
            cure,
        )
