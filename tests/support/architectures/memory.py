"""Models of single architectures for tests of the K/V memory.

    model = routed("llama4", sequences)      # instead of a Tiny of tests/support/tiny_gguf.py
    model.write(folder / "mod.gguf")
    model.forward(tokens).logits

What is right is what a context says that decodes a text in one batch and never frees a cell. That
context with all units active gives what the stock library gives (test_windows.py).
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mod_export.units import BLOCK, FFN, KV, Unit, deciding_order
from tests.support.architectures import models, routers
from tests.support.architectures.models import Model
from tests.support.c_api import Raw
from tests.support.tiny_gguf import Out, widest_gap
from tests.support.windows import Window

# One with sliding windows, one with chunks, one whose last layers read the K/V of earlier ones, one
# that stores K alone, and two whose heads weigh distances (ALiBi); and the noise of their logits in
# f32, and with flash attention on f16. The logits have a standard deviation of 0.3 to 0.4.
# llama.cpp takes GELU from a table for inputs in f16, so float noise can move an input to the next
# entry. Of 200 tokens of dense BLOOM in the stock library, logits token by token and in one batch
# differ by up to 2.3e-4; where ggml computes GELU (without GGML_GELU_FP16), by 3.6e-7.
WINDOWED = {"gemma3": (1.5e-4, 5e-4), "llama4": (3e-5, 2e-3), "gemma4-e": (3e-3, 5e-3)}
WITHOUT_V = {"deepseek2-heads": (1.5e-4, 5e-4)}
BIASED = {"refact-grouped": (3e-5, 2e-3), "bloom": (5e-4, 5e-3)}
NOISE = WINDOWED | WITHOUT_V | BIASED
NAMES = tuple(NOISE)
# Recurrent layers among full ones: delta nets in chunks of tokens, and scans. The stock library's
# logits of one text, cut into batches in different ways, differ by less than 5e-7.
HYBRID_NOISE = dict.fromkeys(("minimax-01", "qwen35", "granitehybrid", "lfm2"), (2e-5, 5e-3))
HYBRIDS = ("minimax-01", "qwen35", "granitehybrid")
DRAFTED = ("qwen35", "lfm2")  # whose states before the last tokens are kept; lfm2 shifts too
STDEV = 0.15  # of the weights; with smaller ones a token depends on other tokens by little
CHUNKED = 2  # enum llama_swa_type
# llama.cpp's chunks are of 8192 positions. The texts of the tests begin shortly before a border.
BEFORE_BORDER = 40
NEVER = 1 << 20  # kv_rollback that frees nothing


@functools.cache
def file(name: str) -> Model:
    """The dense model, written once in each process."""
    folder = Path(tempfile.mkdtemp(prefix="architectures-"))
    atexit.register(shutil.rmtree, folder)
    (model,) = models.write(folder, [name], stdev=STDEV)
    return model


@dataclass(frozen=True)
class RoutedFile:
    """A model of an architecture with routers, with what the tests ask of a Tiny.

    biases: unit -> bias of its router; its threshold is 0.5
    n_back: how many tokens contexts of the tests can take back from recurrent layers
    """

    model: Model
    biases: dict[Unit, float] = field(default_factory=dict)
    kv_window: int = routers.WINDOW
    windows: dict = field(default_factory=dict)
    n_back: int = 0

    def window_of(self, unit: Unit) -> int:
        return self.windows.get(unit, self.kv_window)

    @property
    def heads(self) -> int:
        """Return how many K/V heads decide apart."""
        return 1 + max((unit.head or 0 for unit in self.units), default=0)

    @property
    def units(self) -> list[Unit]:
        return sorted(self.biases, key=deciding_order)

    @property
    def routers(self) -> dict:
        return {unit: (None, bias, 0.5) for unit, bias in self.biases.items()}

    @property
    def n_layer(self) -> int:
        return self.model.n_layer

    @property
    def n_swa(self) -> int:
        return self.model.n_swa

    @property
    def sliding(self) -> tuple[int, ...]:
        return self.model.sliding

    @property
    def without_kv(self) -> tuple[int, ...]:
        return self.model.without_kv

    @property
    def recurrent(self) -> tuple[int, ...]:
        return self.model.recurrent

    @property
    def start(self) -> int:
        """The position of the first token of a text."""
        return self.model.n_swa - BEFORE_BORDER if self.model.swa_type == CHUNKED else 0

    @property
    def window(self) -> Window:
        return Window(self.model.n_swa, self.model.swa_type == CHUNKED, self.start)

    @property
    def noise(self) -> float:
        return (NOISE | HYBRID_NOISE)[self.model.name][0]

    @property
    def fa_noise(self) -> float:
        return (NOISE | HYBRID_NOISE)[self.model.name][1]

    def write(self, path: Path) -> Path:
        if not self.biases:
            return Path(shutil.copyfile(self.model.path, path))
        return routers.route(self.model, path, self.units, biases=self.biases)

    def dense(self) -> RoutedFile:
        return replace(self, biases={})

    def forward(self, tokens, shift=0.0) -> Out:
        """Run one text. shift: one number, or one number per token."""
        shifts = np.broadcast_to(np.asarray(shift, float), len(tokens))
        parts = np.flatnonzero(np.diff(shifts)) + 1
        found = []
        with self._reference() as r:
            for part, by in zip(np.split(tokens, parts), np.split(shifts, parts), strict=True):
                r.set(shift=float(by[0]))
                found.append((r.decode(part), *r.trace()))
        logits, active, score = (np.concatenate(x) for x in zip(*found, strict=True))
        return Out(logits, active.astype(bool), score, np.zeros((len(tokens), 0)))

    def _reference(self) -> Raw:
        with tempfile.TemporaryDirectory() as folder:
            path = self.write(Path(folder) / "mod.gguf")
            r = Raw(path, n_ctx=512, n_seq=1, start=self.start)
        r.set(kv_rollback=NEVER)
        return r


def routed(name: str, sequences, activation: float = 0.5) -> RoutedFile:
    """Put random routers of all kinds that can be on a model.

    Biases lie in gaps between the scores of the sequences, as with Tiny.place_biases.
    """
    model = file(name)
    result = RoutedFile(model, dict.fromkeys(_units(model), 0.0))
    for at, unit in enumerate(result.units):
        scores = [result.forward(tokens).score[:, at] for tokens in sequences]
        result.biases[unit] = -widest_gap(np.concatenate(scores), activation)
    return result


def _units(model: Model) -> list[Unit]:
    """kv units on all full layers, a block unit on the last one, an ffn unit on another one.

    That is a sliding or a recurrent one. A model without such layers has the ffn unit on the first
    layer, and no kv unit there. The kv units are those of K/V heads where the model has several.
    """
    other = model.sliding or model.recurrent or model.full
    full = [layer for layer in model.full if layer != other[0]]
    units = [Unit(layer, KV) for layer in full] + [Unit(full[-1], BLOCK)]
    if model.architecture != "gemma4":  # which can have none
        units.append(Unit(other[0], FFN))
    return routers.by_head(model, units)
