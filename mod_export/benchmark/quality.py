"""What a shift of the thresholds costs, in a process of its own: activation, and divergence from
the dense model.

The dense model is the MoD file with every unit active. Speaks as bench_worker does; run by
bench_sweep.py.
"""

import numpy as np

from mod_export.benchmark.process_helpers import prompt_tokens
from mod_export.benchmark.worker import serve
from mod_export.evaluation.parity import ROWS, compare

LOGITS = 256 << 20  # bytes of the dense model's logits that are kept


class Quality:
    """A MoD file and sequences of a held-out text; without a vocabulary there is no text, and no
    divergence.
    """

    def __init__(
        self,
        file: str,
        text: str,
        length: int = 512,
        sequences: int = 2,
        threads: int | None = None,
    ):
        from mod_export.runtime.llama import MoDLlama

        self.llm = MoDLlama(file, n_ctx=length, n_batch=length, threads=threads, logits_all=True)
        self.compare = self.llm.has_vocab
        if self.compare:
            sequences = max(1, min(sequences, LOGITS // (4 * self.llm.n_vocab() * length)))
        tokens = prompt_tokens(self.llm, text, length * sequences)
        self.sequences = [tokens[i : i + length] for i in range(0, len(tokens), length)]
        self.dense = []
        if self.compare:
            self.llm.force = "active"
            self.dense = [self._logits(sequence) for sequence in self.sequences]
            self.llm.force = "none"

    def describe(self) -> dict:
        return {
            "units": len(self.llm.units),
            "compare": self.compare,
            "tokens": sum(map(len, self.sequences)),
        }

    def measure(self, shift: float) -> dict:
        """activation; kl in nats per token and top1_agreement with the dense model, None without a
        text.
        """
        self.llm.shift = shift
        self.llm.reset_stats()
        sums, n = np.zeros(2), 0
        for i, sequence in enumerate(self.sequences):
            logits = self._logits(sequence)
            if self.compare:
                sums += divergence(self.dense[i], logits)
                n += len(sequence)
        kl, same = sums / n if n else (None, None)
        return {
            "shift": shift,
            "activation": self.llm.activation(),
            "kl": kl,
            "top1_agreement": same,
        }

    def _logits(self, tokens: list[int]) -> np.ndarray:
        """[T, n_vocab] of a sequence from its beginning."""
        self.llm.reset()
        self.llm.eval(tokens)
        return self.llm.scores[: len(tokens)].copy() if self.compare else np.zeros((0, 0))


def divergence(dense: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Sums over the rows of logits [T, n_vocab]: KL of the next-token distributions in nats, same
    likeliest token.
    """
    sums = np.zeros(2)
    for i in range(0, len(dense), ROWS):
        sums += compare(dense[i : i + ROWS], other[i : i + ROWS])[:, :2].sum(0)
    return sums


if __name__ == "__main__":
    serve(Quality)
