"""How the next token is chosen: one record for chat, completions and generated data.

Example:

    llm.generate(tokens, **Sampling(temperature=0.2).options())    # one sequence
    sampler = Sampling(seed=3).sampler(number=7, n_vocab=32000)    # one of several sequences
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mod_export.runtime import bindings  # noqa: F401  first: it tells of a missing llama_cpp

from llama_cpp import _internals  # isort: skip

PENALTY_TOKENS = 64  # the penalties look at this many last tokens, as llama_cpp.Llama's do


@dataclass(frozen=True)
class Sampling:
    """The parameters of sampling. Temperature 0 takes the likeliest token.

    These values are off: top_p 1, top_k 0, min_p 0, repeat_penalty 1, frequency_penalty 0,
    presence_penalty 0. As in llama.cpp, top_k, top_p and min_p cut the model's own distribution,
    and the temperature applies to the rest.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0

    def options(self) -> dict[str, float]:
        """The keyword arguments of MoDLlama.generate; the seed goes to MoDLlama.set_seed."""
        return {
            "temp": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repeat_penalty": self.repeat_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
        }

    def sampler(self, number: int, n_vocab: int) -> _internals.LlamaSampler:
        """A sampler for sequence `number`; its draws do not depend on the other sequences."""
        chain = _internals.LlamaSampler()
        penalties = self.repeat_penalty, self.frequency_penalty, self.presence_penalty
        if penalties != (1, 0, 0):
            chain.add_penalties(n_vocab, PENALTY_TOKENS, *penalties)
        if self.temperature == 0:
            chain.add_greedy()
            return chain
        if self.top_k > 0:
            chain.add_top_k(self.top_k)
        if self.top_p < 1:
            chain.add_top_p(self.top_p)
        if self.min_p > 0:
            chain.add_min_p(self.min_p)
        chain.add_temp(self.temperature)
        # 31 bits, because llama.cpp takes the largest 32-bit seed for "any seed".
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]) >> 1
        chain.add_dist(seed)
        return chain
