"""Keys, values and hidden states of tokens that nothing trained precedes, kept by the
tokens' ids.

A radix tree: samples that begin with the same tokens share what is kept of these, and
its size in bytes has a limit. Torch only.

Shapes: N tokens of an edge of the tree, P tokens of a prompt, K heads, H head size, D
hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import NamedTuple

import torch
from torch import Tensor

# A full tree keeps what has been used within so many times its number of edges: an
# epoch in another order meets each sample again within twice the number of samples, of
# which a tree may hold few.
_IDLE = 64
# The share of the limit for what is added to a full tree: a training step may use it
# again, and the next samples take its place.
_GUESTS = 0.125


class States(NamedTuple):
    """What a base computed for consecutive tokens of one sample: keys and values
    (K, N, H) of each layer, and the last hidden states (N, D)."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    hidden: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> States:
        """Return a function of each tensor; the tokens are its last axis but one."""
        keys = [function(k) for k in self.keys]
        values = [function(v) for v in self.values]
        return States(keys, values, function(self.hidden))

    def columns(self, start: int, stop: int) -> States:
        if (start, stop) == (0, self.tokens):
            return self
        return self.map(lambda t: t[..., start:stop, :])

    def of_row(self, row: int) -> States:
        """Return those of a row, from tensors of several rows."""
        return self.map(lambda t: t[row])

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return self.hidden.shape[-2]

    @property
    def bytes(self) -> int:
        tensors = *self.keys, *self.values, self.hidden
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(eq=False)
class _Edge:
    """Tokens that follow those of the edge above it."""

    ids: Tensor
    states: States
    above: _Edge | None
    root: Hashable
    below: dict[int, _Edge] = field(default_factory=dict)
    used: int = 0


class KeptStates:
    """States of the beginnings of samples, up to a number of bytes.

    Args:
        limit: the number of bytes.
        device: where they are kept.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit, self.device = limit, device
        self._lock = RLock()
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self.bytes = self.lookups = 0
        self._roots: dict[Hashable, dict[int, _Edge]] = {}
        # The one used longest ago first. What is above an edge is used with it, and
        # noted after it, so that the first has nothing below it.
        self._edges: OrderedDict[_Edge, None] = OrderedDict()
        self._guests: OrderedDict[_Edge, None] = OrderedDict()  # of them
        self._bytes_of_guests = 0

    def __len__(self) -> int:
        return len(self._edges)

    def __reduce__(self) -> tuple[type[KeptStates], tuple[int, torch.device]]:
        return type(self), (self.limit, self.device)  # a copy begins empty

    def find(self, root: Hashable, ids: Tensor) -> list[States]:
        """Return the states of as many of the first tokens as are kept, in pieces."""
        with self._lock:
            return self._find(root, ids)

    def _find(self, root: Hashable, ids: Tensor) -> list[States]:
        self.lookups += 1
        path, pieces, done = [], [], 0
        below = self._roots.get(root, {})
        while done < len(ids) and (edge := below.get(int(ids[done]))) is not None:
            same = _common(edge.ids, ids[done:])
            path.append(edge)
            pieces.append(edge.states.columns(0, same))
            done += same
            if same < len(edge.ids):
                break
            below = edge.below
        self._use(path)
        return pieces

    def add(self, root: Hashable, ids: Tensor, states: States) -> None:
        """Keep the states of a sample's first tokens, as far as there is room.

        Args:
            ids: all P of them, from the first on.
            states: of those after the longest beginning that was kept when they were
                computed.
        """
        with self._lock:
            self._add(root, ids, states)

    def _add(self, root: Hashable, ids: Tensor, states: States) -> None:
        skipped, path, done = len(ids) - states.tokens, [], 0
        below = self._roots.setdefault(root, {})
        while done < len(ids) and (edge := below.get(int(ids[done]))) is not None:
            same = _common(edge.ids, ids[done:])
            if same < len(edge.ids):
                if done + same < len(ids):
                    edge = self._split(edge, same)
                path.append(edge)
                done += same
                break
            path.append(edge)
            done += same
            below = edge.below
        self._use(path)
        if not skipped <= done < len(ids):
            return  # all are kept, or some before these no longer
        # Compact copies: a view would keep the tensors of the whole batch.
        new = states.columns(done - skipped, states.tokens)
        above = path[-1] if path else None
        is_guest = self.bytes + new.bytes > self.limit
        if not self._make_room(new.bytes, path):
            return
        new = new.map(lambda t: t.to(self.device, copy=True).contiguous())
        added = _Edge(ids[done:].clone(), new, above, root)
        (above.below if above else self._roots[root])[int(ids[done])] = added
        self.bytes += new.bytes
        if is_guest:
            self._guests[added] = None
            self._bytes_of_guests += new.bytes
        self._use([*path, added])

    def _use(self, path: list[_Edge]) -> None:
        for edge in reversed(path):
            edge.used = self.lookups
            self._edges[edge] = None
            self._edges.move_to_end(edge)
            if edge in self._guests:
                self._guests.move_to_end(edge)

    def _split(self, edge: _Edge, count: int) -> _Edge:
        """Cut an edge after some tokens, and return its first part."""
        copies = [
            edge.states.columns(*part).map(Tensor.clone)
            for part in ((0, count), (count, len(edge.ids)))
        ]
        first = _Edge(edge.ids[:count], copies[0], edge.above, edge.root)
        siblings = edge.above.below if edge.above else self._roots[edge.root]
        siblings[int(edge.ids[0])] = first
        first.below[int(edge.ids[count])] = edge
        edge.ids, edge.states, edge.above = edge.ids[count:], copies[1], first
        first.used = edge.used
        if edge in self._guests:
            self._guests[first] = None
        return first

    def _make_room(self, size: int, path: list[_Edge]) -> bool:
        """Remove what has been idle, or guests, but none of the path; return whether
        there is room."""
        while self.bytes + size > self.limit:
            removed = next(iter(self._edges), None)
            if removed is None or removed in path or not self._can_go(removed, size):
                leaves = (g for g in self._guests if not g.below and g not in path)
                removed = next(leaves, None)
            if removed is None:
                return False
            self._remove(removed)
        return True

    def _can_go(self, edge: _Edge, size: int) -> bool:
        """Whether an edge is idle, or guests have less than their share."""
        is_idle = self.lookups - edge.used >= _IDLE * len(self)
        return is_idle or self._bytes_of_guests + size <= _GUESTS * self.limit

    def _remove(self, edge: _Edge) -> None:
        del self._edges[edge]
        siblings = edge.above.below if edge.above else self._roots[edge.root]
        del siblings[int(edge.ids[0])]
        self.bytes -= edge.states.bytes
        if edge in self._guests:
            del self._guests[edge]
            self._bytes_of_guests -= edge.states.bytes


def _common(a_N: Tensor, b_N: Tensor) -> int:
    """Return the number of first entries that are equal."""
    size = min(len(a_N), len(b_N))
    differs = a_N[:size] != b_N[:size]
    return int(differs.to(torch.uint8).argmax()) if differs.any() else size
