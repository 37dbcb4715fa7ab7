"""What a shift of the thresholds costs, in a process of its own.

It measures the activation and the divergence from the dense model, which is the MoD file with every
unit active. sweep.py starts it as `python -m mod_export.benchmark.quality`; processes.py has the
protocol.
"""

import numpy as np

from mod_export.benchmark.processes import prompt_tokens, serve
from mod_export.metrics import divergence

DENSE_LOGITS_BYTES = 256 << 20  # This many bytes of the dense model's logits are kept.


class Quality:
    """A MoD file and sequences of a held-out text.

    A file without a vocabulary has no text, and so no divergence.
    """

    def __init__(
        self,
        file: str,
        text: str,
        length: int = 512,
        sequences: int = 2,
        threads: int | None = None,
        mod: str | None = None,
    ):
        from mod_export.runtime.llama import MoDLlama

        self.llm = MoDLlama(
            file, mod=mod, n_ctx=length, n_batch=length, threads=threads, logits_all=True
        )
        self.compare = self.llm.has_vocab
        if self.compare:
            sequences = max(
                1, min(sequences, DENSE_LOGITS_BYTES // (4 * self.llm.n_vocab() * length))
            )
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
        """The figures at one shift.

        kl (nats per token) and top1_agreement compare with the dense model. Both are None without a
        text.
        """
        self.llm.shift = shift
        self.llm.reset_stats()
        sums = np.zeros(4)
        n = 0
        for i, sequence in enumerate(self.sequences):
            logits = self._logits(sequence)
            if self.compare:
                sums += divergence(self.dense[i], logits)
                n += len(sequence)
        kl, _, _, same = sums / n if n else (None, None, None, None)
        return {
            "shift": shift,
            "activation": self.llm.activation(),
            "kl": kl,
            "top1_agreement": same,
        }

    def _logits(self, tokens: list[int]) -> np.ndarray:
        """Logits of a sequence from its beginning, [T, n_vocab]."""
        self.llm.reset()
        self.llm.eval(tokens)
        return self.llm.scores[: len(tokens)].copy() if self.compare else np.zeros((0, 0))


if __name__ == "__main__":
    serve(Quality)
