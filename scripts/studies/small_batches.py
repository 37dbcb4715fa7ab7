"""How long does a decode of one token each for 1, 2, 4, 8 and 16 sequences take?

    python -m scripts.studies.small_batches dense.gguf
    LLAMA_CPP_LIB_PATH=FOLDER python -m scripts.studies.small_batches dense.gguf   # another library

Median of decodes after 64 tokens of each sequence, in milliseconds. Run it on a quiet machine.
"""

from __future__ import annotations

import os
import time
from statistics import median

import click
import llama_cpp
import numpy as np

from mod_export.common.system import usable_cpus
from mod_export.common.tables import format_table

SIZES = (1, 2, 4, 8, 16)
BEFORE = 64  # tokens of each sequence
DECODES = 40
SILENT = llama_cpp.llama_log_callback(lambda *_: None)  # the library holds no reference


def open_context(file: str, threads: int):
    """A model and its context, for as many sequences as the largest batch has."""
    llama_cpp.llama_log_set(SILENT, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        os.fsencode(file), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise SystemExit(f"cannot open {file}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = max(SIZES) * (BEFORE + DECODES)
    params.n_seq_max, params.kv_unified = max(SIZES), True
    params.n_threads = params.n_threads_batch = threads
    return model, llama_cpp.llama_init_from_model(model, params)


def decode(context, batch, tokens: np.ndarray, start: int) -> float:
    """Milliseconds of a decode of tokens [sequences, n] at the positions from `start` on."""
    batch.n_tokens = tokens.size
    for i, ((sequence, at), token) in enumerate(np.ndenumerate(tokens)):
        batch.token[i], batch.pos[i] = token, start + at
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        batch.logits[i] = at == tokens.shape[1] - 1
    began = time.perf_counter()
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("the decode failed")
    llama_cpp.llama_synchronize(context)
    return 1e3 * (time.perf_counter() - began)


@click.command()
@click.argument("file", type=click.Path(exists=True))
@click.option("--threads", type=int, help="By default all that this process may use.")
def main(file: str, threads: int | None) -> None:
    """Measure FILE with the library that is installed."""
    model, context = open_context(file, threads or usable_cpus())
    batch = llama_cpp.llama_batch_init(max(SIZES) * BEFORE, 0, 1)
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    tokens = np.random.default_rng(0).integers(n_vocab, size=(max(SIZES), BEFORE + DECODES))
    rows = []
    for size in SIZES:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        decode(context, batch, tokens[:size, :BEFORE], 0)
        taken = [
            decode(context, batch, tokens[:size, at : at + 1], at)
            for at in range(BEFORE, BEFORE + DECODES)
        ]
        rows.append([size, f"{median(taken):.2f}", f"{median(taken) / size:.2f}"])
    click.echo(format_table(["sequences", "ms", "ms for each token"], rows))


if __name__ == "__main__":
    main()
