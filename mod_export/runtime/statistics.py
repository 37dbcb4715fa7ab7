"""What MoDLlama tells of a file and a context, as records.

llm.units[0].kind              # a RoutedUnit
llm.kv().used                  # a KVMemory
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RoutedUnit:
    """A routed unit, with the threshold and the activation (on calibration text) of the file.

    head: the K/V head that a kv unit decides about, None for all of the layer. window: the recent
    tokens that a kv unit always sees, 0 for other kinds.
    """

    index: int
    layer: int
    kind: str
    threshold: float
    activation: float
    head: int | None = None
    window: int = 0


@dataclass(frozen=True)
class UnitStats:
    """Tokens that met the unit's router, and those of them that were active."""

    unit: RoutedUnit
    seen: int
    active: int

    @property
    def share(self) -> float:
        return self.active / self.seen if self.seen else float("nan")


@dataclass(frozen=True)
class KVMemory:
    """The KV memory of a context.

    reserved: bytes of address space. committed: bytes of memory behind it. used: bytes of the cells
    in use; a cell holds K and V of one token in a layer, or in one K/V head that has cells of its
    own. dense: bytes that llama.cpp would use for the same tokens in a dense model; in a sliding
    layer these are the cells of the window and a ubatch.
    """

    cells: int
    cells_used: int
    reserved: int
    committed: int
    used: int
    dense: int


@dataclass(frozen=True)
class PerfCounters:
    """Numbers of decodes, tokens and graphs, and where the time went.

    graphs_reused: graphs that were not built again. decode_graphs: graphs of small batches, which
    are kept. decode_resized: decode graphs that were built again because the range of KV cells
    outgrew them. us_*: microseconds spent on forming the batches of active tokens (route), on KV
    cells (slots), on building graphs, on their inputs, on running them, and on reading scores back.
    """

    decodes: int
    tokens: int
    graphs: int
    graphs_reused: int
    decode_graphs: int
    decode_resized: int
    us_route: int
    us_slots: int
    us_build: int
    us_inputs: int
    us_compute: int
    us_read: int
