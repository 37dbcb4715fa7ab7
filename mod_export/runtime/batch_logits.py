"""MoDLlama with the logits of one batch at a time.

Example:

    llm = BatchLogitsLlama("mod.gguf", n_batch=512)
    llm.all_rows = True
    llm.eval(tokens)          # at most n_batch tokens
    llm.logits                # float32 [n, n_vocab]
"""

import numpy as np

from mod_export.runtime.llama import MoDLlama


class BatchLogitsLlama(MoDLlama):
    """Hands over the logits of the last batch.

    llama_cpp.Llama would keep a row of the vocabulary for each of the n_ctx tokens. all_rows: True
    gives the logits of all tokens of a batch, [n, n_vocab], False those of the last, [1, n_vocab].
    """

    all_rows = True
    logits: np.ndarray

    def _decode(self, tokens: list[int]) -> None:
        n = len(tokens)
        self._batch.set_batch(batch=tokens, n_past=self.n_tokens, logits_all=self.all_rows)
        self._ctx.decode(self._batch)
        self.input_ids[self.n_tokens : self.n_tokens + n] = tokens
        self.n_tokens += n
        self._requires_eval = False
        shape = (n if self.all_rows else 1, self.n_vocab())
        self.logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape).copy()
