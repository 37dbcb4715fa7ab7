"""What the patched runtime must remember: a slow model of its KV bookkeeping in plain Python.

The model knows no cell indices and computes nothing: decisions come from the runtime's trace. A
`Cell` is the K/V of one token in one cache. A sequence that has given a cell back stays in the
`gone` of that cell, because a later query might have needed the cell.

Two questions have a margin. K/V that a query would see and that are gone *must* be refused
(`needs_lost`). The runtime remembers only the largest position that it has given back, so the
runtime *may* refuse more (`may_refuse`).

Sources: docs/explanation/semantics.md and docs/explanation/runtime-design.md.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np

from mod_export.units import Unit
from tests.support.windows import Window

END = 2**31 - 1
COMPLETE, SLIDING = -1, -2  # the caches that layers have in common
MIXED = ("mixed",)  # the origin of tokens that were decoded with several settings


@dataclass
class Cell:
    """The K/V of one token in one cache."""

    pos: int
    seqs: set[int]
    dropped: bool = False  # A kv unit dropped the token, which is visible in the window only.
    new: bool = True  # stored by the decode that runs
    gone: set[int] = field(default_factory=set)  # sequences that gave it back
    token: int = -1  # its id, in the layers with complete K/V
    made: int = 0  # another number for each token that was ever stored there
    moves: int = 0  # how often it was moved since then

    def copy(self) -> Cell:
        # dataclasses.replace takes three times as long, and states have many cells
        seqs, gone = set(self.seqs), set(self.gone)
        rest = (self.token, self.made, self.moves)
        return Cell(self.pos, seqs, self.dropped, self.new, gone, *rest)

    def moved(self, src: int, dst: int) -> Cell:
        """Return the cell for one sequence alone, under another number."""
        seqs, gone = ({dst} if src in old else set() for old in (self.seqs, self.gone))
        return replace(self, seqs=seqs, new=False, gone=gone)


@dataclass
class Sequence:
    """What is known of one sequence beside its cells.

    lost: by name of window, an upper bound of the positions given back since it was last empty.
    origin: the settings that its tokens were decoded with; None for no tokens.
    spliced: it got a part of another sequence that is not that one's beginning.
    back: how many of its last tokens recurrent layers can take back.
    """

    lost: dict[str, int]
    broken: str = "no"  # "must": a decode has to refuse it; "may": it can
    origin: tuple | None = None
    spliced: bool = False
    back: int = 0

    def copy(self) -> Sequence:
        return replace(self, lost=dict(self.lost))

    def add(self, origin: tuple | None) -> None:
        """Add tokens of this origin."""
        self.origin = origin if self.origin in (None, origin) else MIXED


class Full(Exception):
    """Raised where a cache has no free cells for the batch."""


class Reference:
    """The caches and sequences of one context.

    units: in the order of the trace's columns.
    windows: "kv": where a query sees what kv units drop; "layer": what sliding layers see.
    heads: how many K/V heads have cells of their own, in layers with kv units.
    own_windows: kv unit -> its window in tokens, where it has another one than the others.
    sliding: the layers that see no more; none of them has units other than ffn.
    without_kv: the layers that hold nothing, because they read what others hold.
    recurrent: those that hold a state for each sequence, of all its tokens. A sequence without it
        is broken.
    n_back: before how many of a sequence's last tokens the states are kept too: of those that came
        in one piece of a batch (ubatch), and once.
    """

    def __init__(
        self,
        units,
        n_layer: int,
        windows: dict[str, Window],
        n_cells: int,
        n_seq: int = 4,
        rollback: int = 64,
        sliding: tuple[int, ...] = (),
        without_kv: tuple[int, ...] = (),
        heads: int = 1,
        own_windows: dict | None = None,
        recurrent: tuple[int, ...] = (),
        n_back: int = 0,
    ):
        self.units, self.n_layer, self.windows = [Unit(*unit) for unit in units], n_layer, windows
        self.n_cells, self.rollback = n_cells, rollback
        self.sliding, self.without_kv, self.recurrent = sliding, without_kv, recurrent
        self.heads, self.own_windows = heads, own_windows or {}
        self.n_back = n_back
        # layer -> its caches, one or one of each head
        kv = {unit.layer for unit in self.units if unit.kind == "kv"}
        self.own = {
            unit.layer: [(unit.layer, head) for head in range(heads if unit.layer in kv else 1)]
            for unit in self.units
            if unit.kind != "ffn"
        }
        # which caches give cells back, and when
        self.drops = {
            (unit.layer, head): self._kv_window(unit)
            for unit in self.units
            if unit.kind == "kv"
            for head in (range(heads) if unit.head is None else [unit.head])
        }
        shared = [COMPLETE]
        if sliding:
            shared.append(SLIDING)
            self.drops[SLIDING] = "layer"
        caches = [*shared, *(cache for caches in self.own.values() for cache in caches)]
        self.cells: dict[object, list[Cell]] = {cache: [] for cache in caches}
        self.seqs = [self._no_tokens() for _ in range(n_seq)]
        self.settings = {"force": "none", "shift": 0.0}
        self._made = count()

    def _kv_window(self, unit: Unit) -> str:
        """Return the name of a unit's window; windows of one size have one name."""
        size = self.own_windows.get(unit, self.windows["kv"].size)
        name = "kv" if size == self.windows["kv"].size else f"kv {size}"
        self.windows.setdefault(name, Window(size))
        return name

    def _no_tokens(self) -> Sequence:
        return Sequence(dict.fromkeys(self.windows, -1))

    @property
    def origin(self) -> tuple:
        """What tokens are decoded with now: a force leaves nothing to the shift."""
        force = self.settings["force"]
        return (force, self.settings["shift"] if force == "none" else 0.0)

    # --- what can be asked

    def used(self) -> list[int]:
        """Return the number of cells in use per layer."""
        count = {cache: sum(bool(c.seqs) for c in cells) for cache, cells in self.cells.items()}
        empty = {*self.without_kv, *self.recurrent}
        return [
            0 if i in empty else sum(count[cache] for cache in self.caches(i))
            for i in range(self.n_layer)
        ]

    def caches(self, layer: int) -> list:
        """Return the caches of a layer: those of its own, or a common one."""
        return self.own.get(layer) or [SLIDING if layer in self.sliding else COMPLETE]

    def positions(self, seq: int) -> list[int]:
        return sorted(c.pos for c in self.cells[COMPLETE] if seq in c.seqs)

    def pos_max(self, seq: int) -> int:
        return max((c.pos for c in self.cells[COMPLETE] if seq in c.seqs), default=-1)

    def pos_min(self, seq: int) -> int:
        return min((c.pos for c in self.cells[COMPLETE] if seq in c.seqs), default=-1)

    def fixed(self, seq: int) -> tuple[int, int]:
        """Return the least and the most of the last position at which the sequence cannot end."""
        queries = [p + 1 for p in self.positions(seq)]
        if not queries:
            return -1, -1
        least = most = queries[0] - 1
        for cache, name in self.drops.items():
            for lost in {c.pos for c in self.cells[cache] if seq in c.gone}:
                seen_by = queries[: bisect_right(queries, self.windows[name].last(lost))]
                if seen_by and seen_by[-1] > lost:
                    least = max(least, seen_by[-1])
        for name, lost in self.seqs[seq].lost.items():
            most = max(most, self.windows[name].last(lost)) if lost >= 0 else most
        if self.recurrent:  # the states before the last one, which drafts go back to, are not told
            least = most = queries[-1] - 1
        return least, most

    def _next_query(self, seq: int, end: int) -> int:
        """Return where the sequence goes on with its tokens below `end`."""
        return 1 + max((p for p in self.positions(seq) if p < end), default=-1)

    def _lacks_state(self, seq: int, end: int) -> bool:
        removed = self.pos_max(seq) + 1 - self._next_query(seq, end)
        return bool(self.recurrent) and removed > self.seqs[seq].back

    def needs_lost(self, seq: int, end: int) -> bool:
        """Return whether the next query would see something that has been given back.

        The query comes after the sequence's tokens below `end`.
        """
        query = self._next_query(seq, end)
        return self._lacks_state(seq, end) or any(
            seq in c.gone and self.windows[window].first(query) <= c.pos < query
            for cache, window in self.drops.items()
            for c in self.cells[cache]
        )

    def may_refuse(self, seq: int, end: int) -> bool:
        query = self._next_query(seq, end)
        lost = self.seqs[seq].lost
        return self._lacks_state(seq, end) or any(
            lost[name] >= 0 and lost[name] >= window.first(query)
            for name, window in self.windows.items()
        )

    # --- decode

    def decode(self, tokens, active, n_ubatch: int, ids) -> None:
        """Store a batch.

        tokens: (seq, pos). active: [n_tokens, n_units]. ids: of the tokens. Raises Full with
        nothing changed.
        """
        start = {s: self.pos_max(s) for s in range(len(self.seqs))}
        before = self.copy()
        try:
            if self.free(COMPLETE) < len(tokens):
                raise Full("the layers with complete K/V")
            for part in self._split(tokens, n_ubatch):
                self._ubatch([tokens[i] for i in part], active[part], [ids[i] for i in part])
                for seq, n in Counter(tokens[i][0] for i in part).items():
                    self.seqs[seq].back = min(self.n_back, n - 1)
                self._expire(start, only_new=True)
        except Full:
            self.cells, self.seqs = before.cells, before.seqs
            raise
        self._expire(start, only_new=False)
        for seq in {seq for seq, _ in tokens}:
            self.seqs[seq].add(self.origin)
        for cell in (c for cells in self.cells.values() for c in cells):
            cell.new = False

    def _split(self, tokens, n_ubatch: int) -> list[list[int]]:
        """Return the tokens of each ubatch.

        Recurrent layers want equally many of each sequence, and those that can be taken back in
        one ubatch.
        """
        if not self.recurrent:
            at = range(len(tokens))
            return [list(at[i : i + n_ubatch]) for i in range(0, len(tokens), n_ubatch)]
        left: dict[int, list[int]] = {}
        for i, (seq, _) in enumerate(tokens):
            left.setdefault(seq, []).append(i)
        tail = self.n_back + 1 if self.n_back else 0
        parts = []
        while left:
            sizes = {seq: len(found) for seq, found in left.items()}
            n = min(max(1, n_ubatch // len(left)), *sizes.values(), n_ubatch)
            whole = [size == n or size - n >= tail for size in sizes.values()]
            taken = list(left)[: [*whole, False].index(False)]
            if not taken:  # the first one alone: all of it, or all but the tail
                taken = list(left)[:1]
                n = sizes[taken[0]] - (tail if sizes[taken[0]] > n_ubatch else 0)
            parts.append([i for seq in taken for i in left[seq][:n]])
            left |= {seq: left[seq][n:] for seq in taken}
            left = {seq: found for seq, found in left.items() if found}
            left = dict(sorted(left.items(), key=lambda item: item[1][0]))
        return parts

    def free(self, cache) -> int:
        return self.n_cells - sum(bool(c.seqs) for c in self.cells[cache])

    def _ubatch(self, tokens, active, ids) -> None:
        for cache in self.cells.keys() & {COMPLETE, SLIDING}:
            self.cells[cache] += [
                Cell(pos, {seq}, cache == SLIDING, token=token, made=next(self._made))
                for (seq, pos), token in zip(tokens, ids, strict=True)
            ]
        for layer, caches in self.own.items():
            runs = np.ones(len(tokens), bool)
            kept = np.ones((len(tokens), len(caches)), bool)
            for i, unit in enumerate(self.units):
                if unit.layer == layer and unit.kind == "kv":
                    heads = slice(None) if unit.head is None else [unit.head]
                    kept[:, heads] = active[:, i, None]
                elif unit.layer == layer and unit.kind != "ffn":
                    runs &= active[:, i]
            for part, cache in enumerate(caches):
                new = [
                    Cell(pos, {seq}, not kept[i, part])
                    for i, (seq, pos) in enumerate(tokens)
                    if runs[i]
                ]
                if self.free(cache) < len(new):
                    raise Full(f"layer {layer}")
                self.cells[cache] += new

    def _expire(self, start: dict[int, int], only_new: bool) -> None:
        """Give back the cells that no query can see any more.

        A query can be the next one, or one after `rollback` tokens are taken back.
        """
        for seq, old_end in start.items():
            end = self.pos_max(seq)
            if end <= old_end:
                continue
            for cache, window in self.drops.items():
                first = self.windows[window].first(end + 1 - self.rollback)
                for c in self.cells[cache]:
                    far = c.pos < first
                    if seq in c.seqs and c.dropped and far and (c.new or not only_new):
                        c.seqs.remove(seq)
                        c.gone.add(seq)
                        lost = self.seqs[seq].lost
                        lost[window] = max(lost[window], c.pos)

    # --- memory operations

    def remove(self, seq: int, p0: int, p1: int, happened: bool) -> bool:
        """Follow seq_rm, and return whether the runtime was right.

        seq: -1 stands for all. happened: what the runtime returned.
        """
        p1 = END if p1 < 0 else p1
        seqs = range(len(self.seqs)) if seq < 0 else [seq]
        tails = [s for s in seqs if self.pos_min(s) < p0 <= self.pos_max(s) < p1]
        if not happened:
            return any(self.may_refuse(s, p0) for s in tails)
        right = not any(self.needs_lost(s, p0) for s in tails)
        for s in seqs:
            tail = p0 <= self.pos_max(s) < p1
            self._forget(s, p0, p1)
            if tail:
                self.seqs[s].broken, self.seqs[s].back = "no", 0
        return right

    def _forget(self, seq: int, p0: int, p1: int) -> None:
        for cells in self.cells.values():
            for c in cells:
                if p0 <= c.pos < p1:
                    c.seqs.discard(seq)
                    c.gone.discard(seq)
            cells[:] = [c for c in cells if c.seqs or c.gone]
        if self.pos_max(seq) < 0:
            self.seqs[seq] = self._no_tokens()
            for c in (c for cells in self.cells.values() for c in cells):
                c.gone.discard(seq)

    def shares(self, a: int, b: int) -> bool:
        return any(a in c.seqs and b in c.seqs for c in self.cells[COMPLETE])

    def copy_sequence(self, src: int, dst: int, p0: int, p1: int) -> None:
        p1 = END if p1 < 0 else p1
        if not any(p0 <= p < p1 for p in self.positions(src)):
            return
        whole = self.pos_max(dst) < 0 and p0 <= self.pos_min(src)
        has_state = whole and self.pos_max(src) < p1 and self.seqs[src].broken == "no"
        self.seqs[dst].add(self.seqs[src].origin)
        self.seqs[dst].spliced |= self.seqs[src].spliced or not whole
        for c in (c for cells in self.cells.values() for c in cells if p0 <= c.pos < p1):
            if src in c.seqs:
                c.seqs.add(dst)
            if src in c.gone:
                c.gone.add(dst)
        end, a, b = self.pos_max(dst), self.seqs[src], self.seqs[dst]
        b.lost = {window: max(a.lost[window], b.lost[window]) for window in b.lost}
        shorter, doubtful = end < self.pos_max(src), (a.broken, b.broken) != ("no", "no")
        if (shorter or doubtful) and self.needs_lost(dst, END):
            b.broken = "must"
        elif doubtful or shorter and self.may_refuse(dst, END):
            b.broken = "may"
        if self.recurrent:
            b.broken = "no" if has_state else "must"
            b.back = a.back if has_state else 0

    def keep(self, seq: int) -> None:
        for s in range(len(self.seqs)):
            if s != seq:
                self._forget(s, 0, END)

    def shift(self, seq: int, p0: int, p1: int, by: int) -> None:
        """Follow seq_add.

        Cells move for all sequences that share them. Cells that get below 0 are removed.
        """
        p1 = END if p1 < 0 else p1
        below = max((p for p in self.positions(seq) if p < p0), default=-1)
        # A token has cells of its own in each sequence that went back to a checkpoint.
        moving = {
            (s, c.pos)
            for c in self.cells[COMPLETE]
            if p0 <= c.pos < p1 and seq in c.seqs
            for s in c.seqs
        }
        for c in (c for cells in self.cells.values() for c in cells):
            if any((s, c.pos) in moving for s in c.seqs | c.gone):
                c.pos += by
                c.moves += 1
        for s in {s for s, _ in moving if by}:
            self.seqs[s].back = 0
        for s, info in enumerate(self.seqs):
            for window, lost in info.lost.items():
                if s == seq and p0 <= lost < p1:
                    info.lost[window] = max(lost + by, below)
                elif by > 0 and lost >= p0:
                    info.lost[window] += by
        for s in range(len(self.seqs)):
            self._forget(s, -END, 0)

    def shift_collides(self, seq: int, p0: int, p1: int, by: int) -> bool:
        """Return whether a sequence would hold a position twice.

        No caller wants that, and which of the tokens is meant is not defined.
        """
        p1 = END if p1 < 0 else p1
        for s in range(len(self.seqs)):
            moved = [
                c.pos + by * (p0 <= c.pos < p1 and seq in c.seqs)
                for c in self.cells[COMPLETE]
                if s in c.seqs
            ]
            if len(set(moved)) < len(moved):
                return True
        return False

    def copy_collides(self, src: int, dst: int, p0: int, p1: int) -> bool:
        p1 = END if p1 < 0 else p1
        return bool({p for p in self.positions(src) if p0 <= p < p1} & set(self.positions(dst)))

    # --- states

    def copy(self) -> Reference:
        new = Reference(
            self.units,
            self.n_layer,
            self.windows,
            self.n_cells,
            len(self.seqs),
            self.rollback,
            self.sliding,
            self.without_kv,
            self.heads,
            self.own_windows,
            self.recurrent,
            self.n_back,
        )
        new.cells = {cache: [c.copy() for c in cells] for cache, cells in self.cells.items()}
        new.seqs = [s.copy() for s in self.seqs]
        return new

    def origins(self, seq: int) -> set[tuple]:
        """What made the tokens of a sequence, or of all with -1."""
        seqs = self.seqs if seq < 0 else [self.seqs[seq]]
        return {s.origin for s in seqs if s.origin is not None}

    def restore(self, saved: Reference) -> None:
        """Restore a whole state, of which the settings are no part."""
        copy = saved.copy()
        self.cells, self.seqs = copy.cells, copy.seqs
        for sequence in self.seqs:
            sequence.back = 0

    def restore_sequence(self, saved: Reference, src: int, dst: int) -> bool:
        """Restore one sequence of a state, into cells of its own.

        Returns False and leaves an empty sequence where free cells are too few.
        """
        self._forget(dst, 0, END)
        new = {
            cache: [c.moved(src, dst) for c in cells if src in c.seqs | c.gone]
            for cache, cells in saved.cells.items()
        }
        if any(self.free(cache) < sum(bool(c.seqs) for c in cells) for cache, cells in new.items()):
            return False
        for cache, cells in new.items():
            self.cells[cache] += cells
        self.seqs[dst] = saved.seqs[src].copy() if self.pos_max(dst) >= 0 else self._no_tokens()
        self.seqs[dst].back = 0
        return True

    # --- checkpoints

    def go_back(self, saved: Reference, src: int, dst: int, end: int) -> None:
        """Restore a checkpoint of one sequence, which then ends at `end`."""
        self._forget(dst, end + 1, END)
        if end < 0:
            return
        for cache in self.drops:
            cells = self.cells[cache]
            for c in cells:
                if c.dropped:
                    c.seqs.discard(dst)
                    c.gone.discard(dst)
            cells[:] = [c for c in cells if c.seqs or c.gone]
            cells += [
                c.moved(src, dst)
                for c in saved.cells[cache]
                if c.dropped and src in c.seqs | c.gone and c.pos <= end
            ]
        info = saved.seqs[src]
        self.seqs[dst].lost, self.seqs[dst].broken = dict(info.lost), info.broken
        self.seqs[dst].back = 0

    def checkpoint_ends(self, saved: Reference, src: int, dst: int) -> tuple[set[int], bool]:
        """Return where the sequence may end after a checkpoint, and whether it may be refused.

        No ends: it must be refused. The last token of the checkpoint may be another one by now.
        """
        last = saved.pos_max(src)
        if last < 0:
            return {-1}, False
        origins = {saved.seqs[src].origin, self.seqs[dst].origin} - {None}
        if origins != {self.origin} or not self._has_room(saved, src, dst):
            return set(), True
        then, now = saved._tokens(src), self._tokens(dst)
        spliced = saved.seqs[src].spliced or self.seqs[dst].spliced
        ends: set[int] = set()
        before = max((p for p in then if p < last), default=-1)
        for end in (last,) if self.recurrent else (last, before):
            a, b = ([x for p, x in sorted(found.items()) if p <= end] for found in (then, now))
            if end < 0 or [x[:2] for x in a] != [x[:2] for x in b]:
                continue
            if a == b and not spliced:
                return ends | {end}, False
            ends.add(end)
        return ends, True

    def _tokens(self, seq: int) -> dict[int, tuple]:
        """What a sequence holds, by position; the first two numbers are what anybody can see."""
        return {
            c.pos: (c.pos, c.token, c.made, c.moves) for c in self.cells[COMPLETE] if seq in c.seqs
        }

    def _has_room(self, saved: Reference, src: int, dst: int) -> bool:
        last = saved.pos_max(src)
        for cache in self.drops:
            wanted = sum(c.dropped and src in c.seqs for c in saved.cells[cache])
            leaving = sum(
                c.seqs == {dst} and (c.dropped or c.pos > last) for c in self.cells[cache]
            )
            if self.free(cache) + leaving < wanted:
                return False
        return True
