"""A cache of constant columns, for forwards with gradients behind tokens without.

Shapes: B rows, K heads, S new tokens, H head size, W columns before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from axolotl_reft.prompts.kept import States


def windows_of(config: PretrainedConfig) -> list[int | None]:
    """Return the window of each layer's cache, None for all tokens."""
    layers = DynamicCache(config=config).layers
    return [getattr(layer, "sliding_window", None) for layer in layers]


def other_caches(config: PretrainedConfig) -> set[str]:
    """Return the kinds of layers' caches that are more than keys and values."""
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    return {k.__name__ for k in kinds - {DynamicLayer, DynamicSlidingWindowLayer}}


class StopForwardError(Exception):
    """Ends a forward from which nothing more is needed, with the last output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class PreambleCache(Cache):
    """Gives each layer the columns before its new tokens, and keeps no new ones, so
    that checkpointing may compute a layer again.

    Args:
        rows: for each row, the states of the tokens before, in pieces; they end at the
            same column.
        windows: of the layers, as :func:`windows_of` returns them.
        stops: with the last layer's keys and values, no hidden states are needed.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[States]],
        windows: Sequence[int | None],
        stops: bool = False,
    ) -> None:
        lengths = [sum(states.tokens for states in pieces) for pieces in rows]
        self.width = max(lengths)
        layers = [
            _PreambleLayer(rows, number, self.width, window)
            for number, window in enumerate(windows)
        ]
        layers[-1].stops = stops
        super().__init__(layers=layers)

    def computed(self, counts: Sequence[int], hidden_BSD: Tensor) -> list[States]:
        """Return what was computed last, for the first new tokens of each row."""
        keys, values = zip(*(layer.new for layer in self.layers), strict=True)
        new = States(keys, values, hidden_BSD)
        return [new.of_row(row).columns(0, n) for row, n in enumerate(counts)]


class _PreambleLayer(CacheLayerMixin):
    stops = False

    def __init__(
        self,
        rows: Sequence[Sequence[States]],
        number: int,
        width: int,
        window: int | None,
    ) -> None:
        super().__init__()
        self._rows, self._number, self._width = rows, number, width
        self.is_sliding, self.is_initialized = window is not None, True
        # A token of a sliding layer sees itself and so many before it.
        self._seen = width if window is None else min(width, window - 1)
        self.new: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.new = key_states.detach(), value_states.detach()
        if self.stops:
            raise StopForwardError(key_states)
        if not self._seen:
            return key_states, value_states
        keys = [[s.keys[self._number] for s in pieces] for pieces in self._rows]
        values = [[s.values[self._number] for s in pieces] for pieces in self._rows]
        return self._behind(keys, key_states), self._behind(values, value_states)

    def _behind(self, rows: list[list[Tensor]], new_BKSH: Tensor) -> Tensor:
        """Return the constant columns, zeros where a row has fewer, and the new."""
        batch, heads, _, size = new_BKSH.shape
        before_BKWH = new_BKSH.new_zeros(batch, heads, self._seen, size)
        for row, pieces in enumerate(rows):
            stop = self._seen
            for piece_KNH in reversed(pieces):
                start = max(stop - piece_KNH.shape[1], 0)
                before_BKWH[row, :, start:stop] = piece_KNH[:, start - stop :]
                stop = start
                if not stop:
                    break
        return torch.cat([before_BKWH, new_BKSH], 2)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._seen + query_length, self._width - self._seen

    def get_seq_length(self) -> int:
        return self._width

    def get_max_length(self) -> int:
        return -1
