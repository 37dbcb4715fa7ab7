"""Embeddings of texts: many sequences in one batch.

Example:

    vectors, n_tokens = embed(llm, ["Hello", "World"])     # a list for each text

llama_cpp.Llama.embed reads the wrong rows for all texts but the first where nothing is pooled,
writes before its buffer for a text without tokens, and pools the last part alone of a text that
llama.cpp has to compute in parts.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from mod_export.runtime.guard import InputError
from mod_export.runtime.log import decode_error, kept_log
from mod_export.runtime.tokens import utf8

import llama_cpp  # isort: skip
from llama_cpp import _internals  # isort: skip


def embed(
    llm: llama_cpp.Llama, texts: list[str], normalize: bool = False, truncate: bool = True
) -> tuple[list[list], int]:
    """The embedding of each text, and the number of their tokens.

    An embedding is a list of n_embd floats, or one such list for each token where the pooling type
    is none. The context is empty afterwards. Raises InputError for a model that was not opened for
    embeddings, a text without tokens, and with truncate=False one that is too long.
    """
    if not llm.context_params.embeddings:
        raise InputError("the model was not opened for embeddings", "open it with embedding=True")
    pooled = llm.pooling_type() != llama_cpp.LLAMA_POOLING_TYPE_NONE
    limit = llm.n_batch
    if llm.metadata.get(f"{llm.metadata.get('general.architecture')}.attention.causal") == "false":
        # Such a model has a row for each position that it was trained for, and no others.
        limit = min(limit, llm._model.n_ctx_train())
    sequences = [
        _tokens(llm, text, f"text {number}", limit, truncate) for number, text in enumerate(texts)
    ]
    vectors: list[list] = []
    batch: list[list[int]] = []
    try:
        for tokens in sequences:
            full = len(batch) == llm.context_params.n_seq_max
            if full or sum(map(len, batch)) + len(tokens) > limit:
                vectors += _embed_batch(llm, batch, pooled)
                batch = []
            batch.append(tokens)
        if batch:
            vectors += _embed_batch(llm, batch, pooled)
    finally:
        llm._ctx.kv_cache_clear()
        llm.reset()
    if normalize:
        vectors = [
            _internals.normalize_embedding(v)
            if pooled
            else [_internals.normalize_embedding(row) for row in v]
            for v in vectors
        ]
    return vectors, sum(map(len, sequences))


def _tokens(llm: llama_cpp.Llama, text: str, name: str, limit: int, truncate: bool) -> list[int]:
    tokens = llm.tokenize(utf8(text, name))
    if not tokens:
        raise InputError(f"{name} has no tokens", "leave empty texts out")
    if len(tokens) > limit and not truncate:
        raise InputError(
            f"{name} has {len(tokens)} tokens, more than a batch of {limit}",
            "open the model with a larger n_batch, or use truncate=True",
        )
    return tokens[:limit]


def _embed_batch(llm: llama_cpp.Llama, batch: list[list[int]], pooled: bool) -> list[list]:
    llm._ctx.kv_cache_clear()
    llm._batch.reset()
    for sequence, tokens in enumerate(batch):
        llm._batch.add_sequence(tokens, sequence, True)
    with kept_log(not llm.verbose) as log:
        try:
            llm._ctx.decode(llm._batch)
        except RuntimeError as exc:
            raise decode_error(exc, log) from exc
    ctx, n_embd = llm.ctx, llm.n_embd()
    if pooled:
        pointers = [llama_cpp.llama_get_embeddings_seq(ctx, i) for i in range(len(batch))]
        return [_vector(pointer, n_embd) for pointer in pointers]
    rows = iter(range(sum(map(len, batch))))
    return [
        [_vector(llama_cpp.llama_get_embeddings_ith(ctx, next(rows)), n_embd) for _ in tokens]
        for tokens in batch
    ]


def _vector(pointer: Any, n_embd: int) -> list[float]:
    if not pointer:
        raise InputError("llama.cpp gave no embedding", "use another pooling_type")
    floats = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(floats, (n_embd,)).tolist()
