"""Take sequences through a model layer by layer: all of them pass a layer before any goes on.

So the weights of one layer are needed at a time, and are read once for all sequences
(model/streaming.py). What the model computes before its first layer, and the masks and position
embeddings that it hands to its layers, come from its own forward. The residual stream of the
sequences is kept in memory, or in a file that has no name where it is large.

    walk = LayerWalk(base, sequences)             # sequences: [T] each
    for layer in walk.layers():
        for number in range(len(sequences)):
            walk.pass_layer(number)               # or walk.run and walk.keep
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mod_export.common.progress import Progress
from mod_export.common.text import size
from mod_export.errors import UserError
from mod_export.model import architectures, streaming
from mod_export.model.fast_products import FastProducts
from mod_export.model.walk_state import WalkState

KEPT_BYTES = 1 << 30  # residual streams of more bytes lie in a file


class LayerWalk:
    """The way of some sequences through the decoder layers of a model."""

    def __init__(self, base: nn.Module, sequences: Sequence[torch.Tensor]):
        self.base = base
        self.parts = architectures.decoder_layers(base)
        self._layer = 0
        self._steps: Steps | None = None
        self._arguments: list[list[tuple[tuple, dict]]] = []
        self._streams: list[torch.Tensor] = []
        for number, ids in enumerate(sequences):
            start, arguments = _collect(base, self.parts, ids[None].to(base.device))
            if not number:
                self._lengths = [len(other) for other in sequences]
                self._room = _room(sum(self._lengths) * start.shape[-1], start.dtype)
                self._streams = _parts(self._room, self._lengths)
            for own, other in zip(arguments, (self._arguments or [arguments])[0], strict=True):
                _share(own[1], other[1])
            self._arguments.append(arguments)
            self.keep(number, start)

    def layers(
        self, stop: int | None = None, label: str | None = None, state: WalkState | None = None
    ) -> Iterator[int]:
        """Yield the layers before `stop`, one after the other, with their weights at hand.

        label: of the progress that is shown. state: goes on behind the layer that it has reached,
        and is kept after each layer.
        """
        stop = len(self.parts) if stop is None else stop
        first = 0 if state is None else state.layer
        if state is not None:
            state.restore(self._room)
        self._steps = Steps(label, first, stop, self._lengths) if label else None
        for layer in range(first, stop):
            self._layer = layer
            with streaming.at_hand(self.base, layer):
                yield layer
            if state is not None:
                state.keep(layer + 1, self._room if layer + 1 < stop else None)
        if self._steps:
            self._steps.progress.clear()

    def h(self, number: int) -> torch.Tensor:
        """Return the residual stream [1, T, n_embd] of a sequence where the layer reads it.

        It holds until `keep` is called for the sequence.
        """
        return self._streams[number].to(self.base.device)

    def run(self, number: int, h: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the layer makes of a sequence, or of another residual stream in its place."""
        args, kwargs = self._arguments[number][self._layer]
        with FastProducts():
            out = self.parts[self._layer].layer(self.h(number) if h is None else h, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def keep(self, number: int, out: torch.Tensor) -> None:
        """Keep what the layer made of a sequence, for the next layer."""
        self._streams[number].copy_(out)
        if self._steps:
            self._steps.tell(self._layer, number)

    def pass_layer(self, number: int) -> None:
        """Run the layer on a sequence, and keep what it makes."""
        self.keep(number, self.run(number))

    @torch.no_grad()
    def logits(self, number: int, rows: slice) -> torch.Tensor:
        """Return the logits [n, n_vocab] of some tokens of a sequence behind the last layer."""
        last = self.h(number)[:, rows]

        def forward_of(part):
            return lambda *_, **__: (last, None) if part.returns_tuple else last

        ids = torch.zeros(1, last.shape[1], dtype=torch.long, device=last.device)
        with _replaced(self.base, self.parts, forward_of):
            return self.base(input_ids=ids, use_cache=False).logits[0]


class Steps:
    """Tells how many of the tokens have passed how many of the layers, and the time left."""

    def __init__(self, label: str, first: int, stop: int, lengths: Sequence[int]):
        self.label, self.first, self.stop = label, first, stop
        self.lengths, self.done = lengths, first * sum(lengths)
        self.progress = Progress()

    def tell(self, layer: int, number: int) -> None:
        """Count that a sequence has passed a layer."""
        self.done += self.lengths[number]
        whole = sum(self.lengths)
        note = f"layer {layer + 1} of {self.stop}"
        self.progress.tell(
            self.label, self.done, self.stop * whole, note, before=self.first * whole
        )


class _AllSeen(Exception):
    """Ends a forward when the arguments of the last layer are known."""


def _collect(base: nn.Module, parts: list, ids: torch.Tensor) -> tuple[torch.Tensor, list]:
    """Return the residual stream before the first layer, and what else each layer is called with.

    ids: [1, T]. Raises UserError where the model does something between its layers.
    """
    arguments: list[tuple[tuple, dict]] = []
    start: list[torch.Tensor] = []

    def forward_of(part):
        def forward(*args, **kwargs):
            h, *rest = args if args else (kwargs.pop("hidden_states"),)
            if not start:
                start.append(h)
            elif h is not start[0]:
                raise architectures.unsupported(base, "it computes something between its layers")
            arguments.append((tuple(rest), kwargs))
            if len(arguments) == len(parts):
                raise _AllSeen
            return (h, None) if part.returns_tuple else h

        return forward

    try:
        with _replaced(base, parts, forward_of):
            kept = architectures.last_logits(1, ids)
            base(input_ids=ids, use_cache=False, logits_to_keep=kept)
    except _AllSeen:
        return start[0], arguments
    raise architectures.unsupported(base, "its forward does not call each layer once")


@contextlib.contextmanager
def _replaced(base: nn.Module, parts: list, forward_of: Callable) -> Iterator[None]:
    """Replace the forwards of all layers, whose weights are not read meanwhile."""
    before = [vars(part.layer).get("forward") for part in parts]
    for part in parts:
        part.layer.forward = forward_of(part)
    try:
        with streaming.layers_untouched(base):
            yield
    finally:
        for part, forward in zip(parts, before, strict=True):
            if forward is None:
                del part.layer.forward
            else:
                part.layer.forward = forward


def _share(own: dict[str, Any], other: dict[str, Any]) -> None:
    """Take the tensors of another sequence where they are equal: masks are as large as [T, T]."""
    for name, value in own.items():
        own[name] = _equal(value, other.get(name))


def _equal(own, other):
    if own is other:
        return own
    if isinstance(own, tuple) and isinstance(other, tuple) and len(own) == len(other):
        return tuple(_equal(a, b) for a, b in zip(own, other, strict=True))
    if not (isinstance(own, torch.Tensor) and isinstance(other, torch.Tensor)):
        return own
    same = own.shape == other.shape and own.dtype == other.dtype and torch.equal(own, other)
    return other if same else own


def _room(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Return room for so many numbers, in a file where they are many."""
    n_bytes = n * dtype.itemsize
    if n_bytes <= KEPT_BYTES:
        return torch.empty(n, dtype=dtype)
    return _unnamed_file(n_bytes, dtype)


def _parts(room: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Return the residual streams [1, T, n_embd] in their room."""
    n_embd = len(room) // sum(lengths)
    return [part.view(1, -1, n_embd) for part in room.split([n * n_embd for n in lengths])]


def _unnamed_file(n_bytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in a file that goes when the tensor does, however the process ends."""
    handle, path = tempfile.mkstemp(prefix="mod-export-", suffix=".tmp")
    try:
        os.posix_fallocate(handle, 0, n_bytes)
        return torch.from_file(path, shared=True, size=n_bytes // dtype.itemsize, dtype=dtype)
    except OSError as exc:
        raise UserError(
            f"no room for {size(n_bytes)} of hidden states in {os.path.dirname(path)} "
            f"({exc.strerror})",
            "free some, set TMPDIR to another directory, or take fewer --calibration-tokens",
        ) from exc
    finally:
        os.close(handle)
        os.unlink(path)
