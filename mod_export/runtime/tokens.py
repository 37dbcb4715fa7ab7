"""Token ids and text, checked before llama.cpp sees them: it ends the process on a wrong id.

Example:

    ids = token_ids([1, 2], n_vocab)
    tokenizer = CheckedTokenizer(llm, guard)
    tokenizer.detokenize(tokenizer.tokenize(b"Hello"))
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Iterable

from mod_export.errors import UserError
from mod_export.runtime import bindings  # noqa: F401  first: it tells of a missing llama_cpp
from mod_export.runtime.guard import Guard, InputError

import llama_cpp  # isort: skip
from llama_cpp.llama_tokenizer import LlamaTokenizer  # isort: skip

PIECE_BYTES = 64  # most pieces are shorter


def token_ids(tokens: Iterable[int], n_vocab: int) -> list[int]:
    """The token ids as a list of int.

    Raises InputError for what is no sequence of whole numbers, and for ids that the vocabulary does
    not have.
    """
    try:
        ids = [operator.index(token) for token in tokens]
    except TypeError:
        what = repr(tokens)
        what = what if len(what) <= 60 else f"{what[:60]}..."
        raise InputError(f"{what} is no list of token ids", "tokenize text first") from None
    if ids and (min(ids) < 0 or max(ids) >= n_vocab):
        wrong = next(token for token in ids if not 0 <= token < n_vocab)
        raise InputError(
            f"token {wrong} does not exist: the vocabulary has {n_vocab} tokens",
            f"use ids from 0 to {n_vocab - 1}",
        )
    return ids


def utf8(text: object, what: str = "the text") -> bytes:
    """The text as UTF-8. Raises InputError for half a surrogate pair, and for what is no text."""
    if not isinstance(text, str):
        raise InputError(f"{what} is no text but {type(text).__name__}", "give a str")
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise InputError(
            f"{what} has half a surrogate pair at character {exc.start}", "decode it as UTF-8"
        ) from None


class CheckedTokenizer(LlamaTokenizer):
    """The tokenizer of a file, as llama_cpp.Llama.tokenizer() gives it, with checks.

    Each method raises InputError for wrong arguments, and UserError for a file without a tokenizer
    and for a closed model.
    """

    def __init__(self, llama: llama_cpp.Llama, guard: Guard):
        super().__init__(llama)
        # Not `llama` itself: it holds this object, and would outlive its last use by the cycle.
        self._guard = guard
        self._path = llama.model_path

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """Token ids of UTF-8 text; with `special` also of the names of special tokens."""
        if not isinstance(text, bytes):
            raise InputError(f"tokenize takes bytes, not {type(text).__name__}", "encode the text")
        with self._guard:
            self.require_vocab()
            return super().tokenize(text, add_bos, special)

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """The bytes of tokens; those of control tokens only with `special`.

        llama_cpp loses the tokens of more than 32 bytes.
        """
        with self._guard:
            ids = self.checked(tokens)
            pieces = b"".join([self._piece(token, special) for token in ids])
            # The space with which a text begins belongs to the tokenizer, as in llama_cpp.
            bos = pieces.startswith(b" ") and ids[0] == self._model.token_bos()
            return pieces[1:] if bos else pieces

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of one token, where the space of a first token stays."""
        with self._guard:
            (checked,) = self.checked([token])
            return self._piece(checked, special)

    def is_control(self, token: int) -> bool:
        """Whether the token is a control token, such as the end of a turn."""
        with self._guard:
            return llama_cpp.llama_vocab_is_control(self._model.vocab, *self.checked([token]))

    def text(self, token: int) -> str:
        """The text of a token as the vocabulary has it."""
        with self._guard:
            raw = llama_cpp.llama_vocab_get_text(self._model.vocab, *self.checked([token]))
            return (raw or b"").decode("utf-8", "replace")

    def checked(self, tokens: Iterable[int]) -> list[int]:
        """The ids, in a file with a vocabulary."""
        self.require_vocab()
        return token_ids(tokens, self._model.n_vocab())

    @property
    def has_vocab(self) -> bool:
        """Whether the file holds a tokenizer; a file without one still has a number of tokens."""
        return self._model.vocab_type() != llama_cpp.LLAMA_VOCAB_TYPE_NONE

    def require_vocab(self) -> None:
        """Raise UserError for a file without a tokenizer, where llama.cpp would abort."""
        if not self.has_vocab:
            raise UserError(f"{self._path} has no tokenizer", "give a file that has one")

    def _piece(self, token: int, special: bool) -> bytes:
        size = PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n
