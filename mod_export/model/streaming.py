"""Models of which one decoder layer is in memory at a time.

`stream` takes a model without weights and a source that reads them. From then on any forward of the
model reads a layer when it begins and drops it when it ends, and of the embeddings it reads the
rows of its tokens. Whoever runs a layer many times keeps it for as long (`at_hand`); model/
layer_walk.py takes many sequences through the model in this way. Of other models all weights are in
memory, and the functions here do nothing.

    with at_hand(base, 5): base.model.layers[5](h, ...)
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from mod_export.model import architectures

HEAD_ROWS = 1 << 14  # of the output matrix, in memory at once
Change = Callable[[torch.Tensor], torch.Tensor]  # of the values of a parameter


class WeightSource(Protocol):
    """What reads the weights of a model."""

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return parameters and buffers on the CPU, in the type that the model has them in."""

    def rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of a matrix, which is none of a layer."""

    def change(self, changes: Mapping[str, Change]) -> None:
        """Change parameters of layers when they are read, and when they are written.

        Raises CannotStream where a parameter is no tensor of its own in the files.
        """


_STREAMED: weakref.WeakKeyDictionary[nn.Module, StreamedLayers] = weakref.WeakKeyDictionary()


def stream(base: nn.Module, source: WeightSource, device: torch.device) -> None:
    """Let `base`, whose parameters are on the device `meta`, read its weights as it needs them.

    What lies outside of the layers, embeddings and output matrix, is read now.
    """
    _STREAMED[base] = StreamedLayers(base, source, device)


def source_of(base: nn.Module) -> WeightSource | None:
    """Return what reads the weights of a model; None where they are all in memory."""
    return _STREAMED[base].source if base in _STREAMED else None


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Put the parameters of models that are made within the block on the device `meta`.

    Their buffers that no file holds, such as rotary frequencies, are computed.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield


@contextlib.contextmanager
def at_hand(base: nn.Module, layer: int) -> Iterator[None]:
    """Keep the weights of a decoder layer in memory within the block."""
    streamed = _STREAMED.get(base)
    if streamed is None:
        yield
        return
    with streamed.at_hand(layer, followed=True):
        yield


@contextlib.contextmanager
def layers_untouched(base: nn.Module) -> Iterator[None]:
    """Read no layer within the block, whose forwards do not run the layers."""
    streamed = _STREAMED.get(base)
    if streamed is None:
        yield
        return
    before, streamed.reads = streamed.reads, False
    try:
        yield
    finally:
        streamed.reads = before


def embedding_rows(base: nn.Module, numbers: Sequence[int]) -> torch.Tensor:
    """Return rows of the input embeddings."""
    rows = torch.tensor(numbers)
    embedding = base.get_input_embeddings()
    streamed = _STREAMED.get(base)
    if streamed is None:
        return embedding.weight.detach()[rows]
    return streamed.source.rows(streamed.names[embedding.weight], rows)


class StreamedLayers:
    """The weights of one model: where they come from, and which are in memory.

    names: of the parameters outside of the layers that are not in memory, by their stand-in
    """

    def __init__(self, base: nn.Module, source: WeightSource, device: torch.device):
        self.source, self.device = source, device
        self.reads = True
        self._held: set[int] = set()
        self._layers = [part.layer for part in architectures.decoder_layers(base)]
        paths = {module: path for path, module in base.named_modules()}
        self._prefixes = [f"{paths[layer]}." for layer in self._layers]
        self._next: dict[int, Future] = {}
        # Copies to a GPU have a stream of their own, so that they run while a layer computes.
        is_cuda = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if is_cuda else None
        self._pool = ThreadPoolExecutor(1) if is_cuda else None
        self.names: dict[torch.Tensor, str] = {}
        self._prepare_rest(base)
        for number, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(partial(self._enter, number))
            layer.register_forward_hook(partial(self._leave, number), always_call=True)

    def _prepare_rest(self, base: nn.Module) -> None:
        """Read what lies outside of the layers, and put stand-ins for the large matrices."""
        head = base.get_output_embeddings()
        of_layers = tuple(self._prefixes)
        stand_ins: dict[torch.Tensor, nn.Parameter] = {}
        small: list[str] = []
        for path, module in base.named_modules():
            if f"{path}.".startswith(of_layers):
                continue
            large = module is head or isinstance(module, nn.Embedding)
            for name, value in list(_values(module)):
                whole = f"{path}.{name}" if path else name
                if not large or name != "weight":
                    small.append(whole)
                    continue
                if value not in stand_ins:
                    stand_ins[value] = _stand_in(value, self.device)
                    self.names[stand_ins[value]] = whole
                module.weight = stand_ins[value]
            if isinstance(module, nn.Embedding):
                self._read_rows(module)
            elif module is head:
                self._read_head(module)
        _assign(base, _moved(self.source.read(small), self.device))
        for name, buffer in list(base.named_buffers()):  # those that no file holds
            _assign(base, {name: buffer.to(self.device)})

    def _read_rows(self, embedding: nn.Embedding) -> None:
        """Let an embedding read the rows of the tokens that it is called with."""
        inner, whole = embedding.forward, embedding.weight

        def forward(ids: torch.Tensor) -> torch.Tensor:
            unique, places = ids.unique(return_inverse=True)
            rows = self.source.rows(self.names[whole], unique.cpu()).to(self.device)
            padding, embedding.padding_idx = embedding.padding_idx, None
            embedding.weight = nn.Parameter(rows, requires_grad=False)
            try:
                return inner(places)
            finally:
                embedding.weight, embedding.padding_idx = whole, padding

        embedding.forward = forward

    def _read_head(self, head: nn.Module) -> None:
        """Let the output matrix be read some rows at a time: it can be as large as many layers."""
        whole, numbers = head.weight, torch.arange(len(head.weight))

        def forward(x: torch.Tensor) -> torch.Tensor:
            logits = []
            for some in numbers.split(HEAD_ROWS):
                rows = self.source.rows(self.names[whole], some).to(self.device)
                bias = None if head.bias is None else head.bias[some.to(self.device)]
                logits.append(F.linear(x, rows, bias))
            return torch.cat(logits, -1)

        head.forward = forward

    def _enter(self, number: int, _layer, _args) -> None:
        if self.reads and number not in self._held:
            self._put(number, followed=False)

    def _leave(self, number: int, layer, _args, _out) -> None:
        if self.reads and number not in self._held:
            self._drop(number)

    @contextlib.contextmanager
    def at_hand(self, number: int, followed: bool) -> Iterator[None]:
        """Keep a layer in memory within the block. followed: the next one will be needed then."""
        if number in self._held:
            yield
            return
        self._put(number, followed)
        self._held.add(number)
        try:
            yield
        finally:
            self._held.discard(number)
            self._drop(number)

    def _put(self, number: int, followed: bool) -> None:
        """Bring a layer to the device, and begin to read the next one where that goes on beside."""
        if self._pool is None:
            _assign(self._layers[number], _moved(self._read(number), self.device))
            return
        future = self._next.pop(number, None) or self._pool.submit(self._copied, number)
        self._next.clear()
        values = future.result()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        for value in values.values():
            value.record_stream(current)
        _assign(self._layers[number], values)
        if followed and number + 1 < len(self._layers):
            self._next[number + 1] = self._pool.submit(self._copied, number + 1)

    def _read(self, number: int) -> dict[str, torch.Tensor]:
        """Return the weights of a layer, by their names in it."""
        prefix = self._prefixes[number]
        names = [f"{prefix}{name}" for name in persistent(self._layers[number])]
        return {name[len(prefix) :]: value for name, value in self.source.read(names).items()}

    def _copied(self, number: int) -> dict[str, torch.Tensor]:
        """Return the weights of a layer on the GPU; the copies may still run."""
        with torch.cuda.stream(self._copies):
            return {
                name: value.pin_memory().to(self.device, non_blocking=True)
                for name, value in self._read(number).items()
            }

    def _drop(self, number: int) -> None:
        layer = self._layers[number]
        _assign(layer, {name: torch.empty_like(p, device="meta") for name, p in _parameters(layer)})


def persistent(module: nn.Module) -> list[str]:
    """Return the names of parameters and buffers that files hold."""
    return list(module.state_dict(keep_vars=True))


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(remove_duplicate=False))


def _values(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a module itself holds of a file's weights."""
    yield from ((name, p) for name, p in module._parameters.items() if p is not None)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _assign(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put tensors in the places of parameters and buffers."""
    for name, value in values.items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        if last in owner._parameters:
            owner._parameters[last] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[last] = value


def _moved(values: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in values.items()}


def _stand_in(value: torch.Tensor, device: torch.device) -> nn.Parameter:
    """Return a parameter of the same shape that takes no memory, and that spoils what uses it."""
    one = torch.full((), float("nan"), dtype=value.dtype, device=device)
    return nn.Parameter(one.expand(value.shape), requires_grad=False)
