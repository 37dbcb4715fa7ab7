"""How the next token is chosen: one record for chat, completions and generated data.

Example:

    sampling = Sampling.of(llm, temperature=0.2)           # the rest as the file recommends
    for token in sampling.generate(llm, tokens): ...       # one sequence
    sampler = sampling.sampler(number=7, n_vocab=32000)    # one of several sequences
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_cpp._internals import LlamaSampler

    from mod_export.runtime.llama import MoDLlama

logger = logging.getLogger(__name__)

ANY_SEED = -1
LARGEST_SEED = 0xFFFFFFFE  # The next number is llama.cpp's own word for any seed.
PENALTY_TOKENS = 64  # the penalties look at this many last tokens, as llama_cpp.Llama's do
MIN_TEMPERATURE = 0.01  # logits over a smaller one overflow, and the answer ends in nonsense
# field -> (least, most) that may be asked for
RANGES = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 1 << 30),
    "min_p": (0, 1),
    "repeat_penalty": (0.1, 10),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
}
# What a GGUF file recommends: key -> field. llama.cpp's tools read these keys
# (common_init_sampler_from_model), and its converter writes them from generation_config.json.
KEYS = "general.sampling."
FIELD_OF_KEY = {
    f"{KEYS}temp": "temperature",
    f"{KEYS}top_p": "top_p",
    f"{KEYS}top_k": "top_k",
    f"{KEYS}min_p": "min_p",
    f"{KEYS}penalty_repeat": "repeat_penalty",
}


@dataclass(frozen=True)
class Sampling:
    """The parameters of sampling. Temperature 0 takes the likeliest token.

    The defaults are those of llama.cpp and of llama_cpp.Llama. These values are off: top_p 1,
    top_k 0, min_p 0, repeat_penalty 1, frequency_penalty 0, presence_penalty 0. As in llama.cpp,
    top_k, top_p and min_p cut the model's own distribution, and the temperature applies to the
    rest. Seed -1 is another one each time.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = ANY_SEED

    @classmethod
    def of(cls, llm: MoDLlama, **chosen: float | None) -> Sampling:
        """The sampling for a model: what is chosen, else what its file recommends.

        A value of None is not chosen. A recommendation that cannot be followed is logged.
        """
        recommended = _recommended(llm.model_path, tuple(llm.metadata.items()))
        return cls(**recommended | {k: v for k, v in chosen.items() if v is not None})

    def generate(self, llm: MoDLlama, tokens: Sequence[int], **more: Any) -> Iterator[int]:
        """Let the model write on after `tokens`, with this seed; `more` goes to its `generate`."""
        llm.set_seed(self._seed)
        return llm.generate(
            tokens,
            temp=self._temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            **more,
        )

    @property
    def _temperature(self) -> float:
        return self.temperature if self.temperature >= MIN_TEMPERATURE else 0.0

    @property
    def _seed(self) -> int:
        """The seed as llama.cpp takes it, in 32 bits."""
        any_seed = LARGEST_SEED + 1
        return any_seed if self.seed == ANY_SEED else self.seed % any_seed

    def sampler(self, number: int, n_vocab: int) -> LlamaSampler:
        """A sampler for sequence `number`; its draws do not depend on the other sequences."""
        import numpy as np

        from mod_export.runtime import bindings  # noqa: F401  it tells of a missing llama_cpp

        from llama_cpp import _internals  # isort: skip

        chain = _internals.LlamaSampler()
        penalties = self.repeat_penalty, self.frequency_penalty, self.presence_penalty
        if penalties != (1, 0, 0):
            chain.add_penalties(n_vocab, PENALTY_TOKENS, *penalties)
        if self._temperature == 0:
            chain.add_greedy()
            return chain
        if self.top_k > 0:
            chain.add_top_k(self.top_k)
        if self.top_p < 1:
            chain.add_top_p(self.top_p)
        if self.min_p > 0:
            chain.add_min_p(self.min_p)
        chain.add_temp(self._temperature)
        seed = self._seed
        if self.seed != ANY_SEED:
            # 31 bits, because llama.cpp takes the largest 32-bit seed for "any seed".
            seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]) >> 1
        chain.add_dist(seed)
        return chain


@functools.lru_cache(maxsize=4)
def _recommended(file: str, metadata: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Fields that the file recommends; the cache is there so that a warning comes once."""
    found: dict[str, Any] = {}
    for key, text in metadata:
        if not key.startswith(KEYS):
            continue
        field, value = FIELD_OF_KEY.get(key), _number(text)
        if field and value is not None and RANGES[field][0] <= value <= RANGES[field][1]:
            found[field] = int(value) if field == "top_k" else value
        else:
            logger.warning(f"{file} recommends {key} = {text}, which is not followed")
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
