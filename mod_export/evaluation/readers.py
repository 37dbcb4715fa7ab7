"""One interface to a sequence of a model, in torch or in llama.cpp, for `mod-export eval`.

    pair = torch_pair(model)                  # .mod: its routers decide; .dense: all units active
    pair.reserve(2048)
    pair.mod.reset()
    for rows in pair.mod.blocks(tokens):      # logits [n, n_vocab], n <= ROWS
        ...
    pair.mod.active                           # decisions [n_tokens, n_units]

A reader knows nothing of texts, tasks and scores. open.py opens a directory in torch, and a GGUF
file in llama.cpp (runtime_reader.py).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.metrics import visible_share
from mod_export.model import architectures
from mod_export.model.mod_model import MoDModel
from mod_export.units import Unit

# Rows of logits [ROWS, n_vocab] in memory at a time. A vocabulary of 150k makes 150 MB of float32.
ROWS = 256
CHUNK_TOKENS = 512  # read at a time where only the last logits are wanted
UNLIMITED_TOKENS = 1 << 30  # context of a model that names none


class Reader(abc.ABC):
    """Reads one sequence of a model at a time.

    name: where the model was opened from. tokenizer: is called as those of transformers are.
    config: which units it has. windows: of the layers, see metrics.visible_share. n_ctx: tokens
    that the model was made for. n_vocab: width of the logits. whole: whether it reads a sequence at
    once. force: "active" where all units are. shift: of the thresholds. routers: a file of routers
    that are put beside it.
    """

    name: str
    tokenizer: object
    config: MoDConfig
    windows: Mapping[int, int]
    n_ctx: int
    n_vocab: int
    whole: bool = False
    force: str | None
    shift: float
    routers: Path | None = None

    def __init__(self):
        self._decisions: list[torch.Tensor] = []
        self._marked = 0

    @property
    def units(self) -> list[Unit]:
        """The routed units, in the order of their decisions."""
        return self.config.routed()

    @abc.abstractmethod
    def read(self, tokens: list[int], all_rows: bool) -> torch.Tensor:
        """Append 1 to CHUNK_TOKENS tokens, and keep their decisions.

        Returns logits [n, n_vocab], or without `all_rows` those of the last token, [1, n_vocab].
        """

    @abc.abstractmethod
    def dense(self) -> Reader:
        """A reader of the same weights with every unit active."""

    def blocks(self, tokens: list[int]) -> Iterator[torch.Tensor]:
        """Append the tokens, and yield their logits [n, n_vocab], at most ROWS rows at a time."""
        for i in range(0, len(tokens), ROWS):
            yield self.read(tokens[i : i + ROWS], all_rows=True)

    def last(self, tokens: list[int]) -> torch.Tensor:
        """Append the tokens, at least one; the logits [n_vocab] of the token after them."""
        for i in range(0, len(tokens), CHUNK_TOKENS):
            rows = self.read(tokens[i : i + CHUNK_TOKENS], all_rows=False)
        return rows[-1]

    @property
    def active(self) -> torch.Tensor:
        """Decisions for the tokens read, bool [n_tokens, n_units]."""
        return torch.cat([torch.zeros(0, len(self.units), dtype=torch.bool), *self._decisions])

    def reserve(self, n_tokens: int) -> None:
        """Make room for sequences of so many tokens.

        Raises UserError where the model is not made for them.
        """
        if n_tokens > self.n_ctx:
            raise UserError(
                f"sequences of {n_tokens} tokens do not fit the context of {self.name}, "
                f"{self.n_ctx}",
                f"use at most {self.n_ctx} tokens with --length and --passkey-lengths, and shorter "
                "tasks",
            )

    def reset(self) -> None:
        """Begin a new sequence."""
        self._decisions.clear()

    def mark(self) -> None:
        """Remember the sequence as it is now, for `rewind`."""
        self._marked = len(self._decisions)

    def rewind(self) -> None:
        """Take back what was read since `mark`; may be repeated."""
        del self._decisions[self._marked :]


class TorchReader(Reader):
    """A MoDModel in its form with a cache.

    That form skips inactive units, and frees K/V that no later token can see. force: None or
    "active", see MoDModel. whole: `blocks` runs all its tokens at once in the dense form, as
    decisions that look at a whole sequence need (top-k). Readers can share a model.
    """

    def __init__(
        self,
        model: MoDModel,
        name: str = "the model",
        force: str | None = None,
        whole: bool = False,
    ):
        super().__init__()
        self.model = model
        self.name = str(name)
        self.force = force
        self.shift = model.shift
        self.whole = whole or not model.strategy.is_causal
        self.tokenizer, self.windows = model.tokenizer, architectures.layer_windows(model.base)
        self.config = model.config
        self.n_ctx = architectures.context_length(model.base) or UNLIMITED_TOKENS
        self.n_vocab = model.base.get_output_embeddings().weight.shape[0]
        self._cache = self._kept = model.new_cache()

    @property
    def dtype(self) -> str:
        """Name of the type that it computes in."""
        return str(self.model.base.dtype).removeprefix("torch.")

    def dense(self) -> TorchReader:
        return TorchReader(self.model, self.name, "active", self.whole)

    def read(self, tokens: list[int], all_rows: bool) -> torch.Tensor:
        return self._run(self.model.step, tokens, self._cache, logits_to_keep=0 if all_rows else 1)

    def blocks(self, tokens: list[int]) -> Iterator[torch.Tensor]:
        return (
            iter(self._run(self.model, tokens).split(ROWS))
            if self.whole
            else super().blocks(tokens)
        )

    @torch.no_grad()
    def _run(self, run: Callable, tokens: list[int], *args, **kwargs) -> torch.Tensor:
        """Logits [n, n_vocab] of a forward of the model."""
        ids = torch.tensor([tokens], device=self.model.base.device)
        with self.model.forced(self.force):
            logits, trace = run(ids, *args, trace=True, **kwargs)
        self._decisions.append(trace.active[0].cpu())
        return logits[0].float()

    def reset(self) -> None:
        super().reset()
        self._cache = self.model.new_cache()

    def mark(self) -> None:
        super().mark()
        self._kept = self._cache.fork()

    def rewind(self) -> None:
        super().rewind()
        self._cache = self._kept.fork()


@dataclass(frozen=True)
class Pair:
    """The readers that are compared; mod is None for a dense model with nothing beside it."""

    dense: Reader
    mod: Reader | None

    def readers(self) -> dict[str, Reader]:
        """{"dense": ..., "mod": ...}, without a reader that is None."""
        return {
            name: reader
            for name, reader in (("dense", self.dense), ("mod", self.mod))
            if reader is not None
        }

    @property
    def measured(self) -> Reader:
        """The reader whose activation and K/V stand beside the scores."""
        return self.mod or self.dense

    def reserve(self, n_tokens: int) -> None:
        """Make room for sequences of so many tokens in both, see Reader.reserve."""
        for reader in self.readers().values():
            reader.reserve(n_tokens)


@dataclass
class Usage:
    """Sums over sequences: what a model ran, and what it remembers at their ends."""

    pairs: int = 0
    active: int = 0
    kv_shares: float = 0.0
    sequences: int = 0

    def add(self, reader: Reader) -> None:
        """Count the sequence that the reader holds now."""
        active = reader.active
        self.pairs += active.numel()
        self.active += int(active.sum())
        self.kv_shares += visible_share(reader.config, active, reader.windows)
        self.sequences += 1

    def shares(self) -> dict[str, float]:
        """The means over the sequences.

        activation: share of (token, unit) pairs that were active. kv_share: K/V that a next token
        could see, over those of the dense model.
        """
        return {
            "activation": self.active / self.pairs if self.pairs else 1.0,
            "kv_share": self.kv_shares / self.sequences,
        }


def torch_pair(model: MoDModel, name: str = "the model") -> Pair:
    """A MoD model and its dense base; for a model that routes nothing the base alone."""
    reader = TorchReader(model, name)
    return Pair(reader.dense(), reader if reader.units else None)
