"""What `mod-export eval` measures on: one sequence of a model, in torch or in the runtime, behind
one interface.

    pair = open_pair("mod.gguf")              # .mod: as its routers decide; .dense: every unit active, or dense="FILE"
    pair.reserve(2048)
    pair.mod.reset()
    for rows in pair.mod.blocks(tokens): ...  # logits [n, n_vocab], n <= ROWS
    pair.mod.active                           # decisions [n_tokens, n_units]

Knows nothing of texts, tasks and scores. A directory is opened in torch, a GGUF file in llama.cpp
(eval_runtime.py).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mod_export.data.text import same_tokens
from mod_export.errors import UserError
from mod_export.formats.hf_directory import is_mod
from mod_export.model import architectures, loading
from mod_export.model.mod_model import MoDModel

# rows of logits [ROWS, n_vocab] in memory at a time: a vocabulary of 150k makes 150 MB of float32
ROWS = 256
CHUNK = 512  # tokens read at a time where only the last logits are wanted
UNLIMITED = 1 << 30  # context of a model that names none


class Reader(abc.ABC):
    """Reads one sequence at a time.

    name: where it was opened from. tokenizer: called as those of transformers are. units: (layer,
    kind) of the routed
    ones. n_ctx: tokens that the model was made for. n_vocab: width of the logits. whole: reads a
    sequence at once.
    """

    name: str
    tokenizer: object
    units: list[tuple[int, str]]
    kv_window: int
    n_layer: int
    n_ctx: int
    n_vocab: int
    whole: bool = False

    def __init__(self):
        self._decisions: list[torch.Tensor] = []
        self._marked = 0

    @abc.abstractmethod
    def read(self, tokens: list[int], all_rows: bool) -> torch.Tensor:
        """Append 1 to CHUNK tokens, noting their decisions; logits [n, n_vocab], or the last
        token's [1, n_vocab].
        """

    @abc.abstractmethod
    def dense(self) -> Reader:
        """A reader of the same weights with every unit active."""

    def blocks(self, tokens: list[int]) -> Iterator[torch.Tensor]:
        """Append the tokens; yields their logits, at most ROWS rows [n, n_vocab] at a time."""
        for i in range(0, len(tokens), ROWS):
            yield self.read(tokens[i : i + ROWS], all_rows=True)

    def last(self, tokens: list[int]) -> torch.Tensor:
        """Append the tokens, at least one; logits [n_vocab] of what comes after them."""
        for i in range(0, len(tokens), CHUNK):
            rows = self.read(tokens[i : i + CHUNK], all_rows=False)
        return rows[-1]

    @property
    def active(self) -> torch.Tensor:
        """Decisions for the tokens read, bool [n_tokens, n_units]."""
        return torch.cat([torch.zeros(0, len(self.units), dtype=torch.bool), *self._decisions])

    def reserve(self, n_tokens: int) -> None:
        """Make room for sequences of so many tokens. Raises UserError where the model is not made
        for them.
        """
        if n_tokens > self.n_ctx:
            raise UserError(
                f"sequences of {n_tokens} tokens do not fit the context of {self.name}, {self.n_ctx}",
                "use shorter ones",
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
    """A MoDModel in its form with a cache, which skips what is inactive and frees K/V that nobody
    can see any more.

    force: None or "active", see MoDModel. whole: `blocks` runs all its tokens at once in the dense
    form, as decisions that look at a whole sequence need (top-k). Readers can share a model.
    """

    def __init__(
        self,
        model: MoDModel,
        name: str = "the model",
        force: str | None = None,
        whole: bool = False,
    ):
        super().__init__()
        self.model, self.name, self.force = model, str(name), force
        self.whole = whole or not model.strategy.is_causal
        self.tokenizer, self.n_layer = model.tokenizer, model.n_layer
        self.units, self.kv_window = model.config.routed(), model.config.kv_window
        self.n_ctx = architectures.context_length(model.base) or UNLIMITED
        self.n_vocab = model.base.get_output_embeddings().weight.shape[0]
        self._cache = self._kept = model.new_cache()

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
    """What is measured, `mod` beside `dense`; mod is None for a dense model with nothing beside it."""

    dense: Reader
    mod: Reader | None

    def readers(self) -> dict[str, Reader]:
        """{"dense": ..., "mod": ...}, without what is not there."""
        return {
            name: reader
            for name, reader in (("dense", self.dense), ("mod", self.mod))
            if reader is not None
        }

    @property
    def measured(self) -> Reader:
        """The one whose activation and K/V stand beside the scores."""
        return self.mod or self.dense

    def reserve(self, n_tokens: int) -> None:
        """Make room for sequences of so many tokens in both. Raises UserError, see Reader.reserve."""
        for reader in self.readers().values():
            reader.reserve(n_tokens)


@dataclass
class Usage:
    """Sums, over the sequences that `add` saw, of what a model ran and what it remembers at their
    ends.
    """

    pairs: int = 0
    active: int = 0
    kv_shares: float = 0.0
    sequences: int = 0

    def add(self, reader: Reader) -> None:
        """Count the sequence that the reader holds now."""
        active = reader.active
        self.pairs += active.numel()
        self.active += int(active.sum())
        self.kv_shares += visible_share(reader.units, reader.kv_window, active, reader.n_layer)
        self.sequences += 1

    def shares(self) -> dict[str, float]:
        """activation: active (token, unit) pairs of all; kv_share: K/V that a next token could see,
        of dense ones.
        """
        return {
            "activation": self.active / self.pairs if self.pairs else 1.0,
            "kv_share": self.kv_shares / self.sequences,
        }


def visible_share(
    units: list[tuple[int, str]], kv_window: int, active: torch.Tensor, n_layer: int
) -> float:
    """Cells whose K/V a next token could see, over those of the dense model. active: decisions
    [n_tokens, n_units].
    """
    n_tokens = len(active)
    recent = (
        torch.arange(n_tokens) >= n_tokens + 1 - kv_window
    )  # the next token's window holds one token less
    visible: dict[int, torch.Tensor] = {}
    for index, (layer, kind) in enumerate(units):
        if kind != "ffn":
            mask = active[:, index] | recent if kind == "kv" else active[:, index]
            visible[layer] = visible[layer] & mask if layer in visible else mask
    cells = (n_layer - len(visible)) * n_tokens + sum(
        mask.sum().item() for mask in visible.values()
    )
    return cells / (n_layer * n_tokens)


def torch_pair(model: MoDModel, name: str = "the model") -> Pair:
    """A MoD model and its dense base; for a model that routes nothing the base alone."""
    reader = TorchReader(model, name)
    return Pair(reader.dense(), reader if reader.units else None)


def open_pair(
    target,
    dense=None,
    shift: float = 0.0,
    threads: int | None = None,
    device: str = "cpu",
    gpu_layers: int = 0,
) -> Pair:
    """Open what is to be measured, and what it is compared with.

    target: a MoD directory, a plain Hugging Face directory, `smollm2`, or a GGUF file, MoD or
    dense. dense: the same,
    by default target with every unit active. shift: of all thresholds of target, in logit space.
    device: of models in torch; gpu_layers: of GGUF files, -1 for all.
    Raises UserError for what cannot be opened, and for two that do not have the same tokens.
    """
    if not math.isfinite(shift):
        raise UserError(f"threshold shift {shift} is not a number", "for example 0.5")
    reader = _open(target, shift, threads, device, gpu_layers)
    if shift and not reader.units:
        raise UserError(
            f"{target} is a dense model, so it has no thresholds to shift",
            "leave out --threshold-shift",
        )
    if dense is None:
        return Pair(reader.dense(), reader) if reader.units else Pair(reader, None)
    other = _open(dense, 0.0, threads, device, gpu_layers)
    if other.units:
        other = other.dense()
    _check_same_tokens(other, reader)
    return Pair(other, reader)


def _open(path, shift: float, threads: int | None, device: str, gpu_layers: int) -> Reader:
    if Path(path).is_file():
        from mod_export.evaluation.runtime_reader import RuntimeReader

        if device != "cpu":
            raise UserError(
                f"--device {device} is of models in torch, and {path} is a file", "use --gpu-layers"
            )
        return RuntimeReader(path, shift=shift, threads=threads, gpu_layers=gpu_layers)
    if not Path(path).exists() and str(path) != loading.EMBEDDED:
        raise UserError(f"no such model: {path}", "give a MoD directory or a GGUF file")
    if threads:
        torch.set_num_threads(threads)
    model = MoDModel.load(path) if is_mod(path) else MoDModel.from_base(*loading.load(path))
    model.shift = shift
    try:
        return TorchReader(model.to(device), path)
    except (
        RuntimeError,
        AssertionError,
    ) as exc:  # torch's words for a device that is unknown, missing or full
        raise UserError(
            f"cannot use --device {device}: {str(exc).splitlines()[0]}", "leave it out"
        ) from exc


def _check_same_tokens(a: Reader, b: Reader) -> None:
    """Raises UserError unless both read a text as the same tokens."""
    if a.n_vocab != b.n_vocab or not same_tokens(a.tokenizer, b.tokenizer):
        raise UserError(
            f"{a.name} and {b.name} have different tokenizers",
            "give the dense model of the same family",
        )
