"""Finds the vectors of a batch's tokens in a tensor inside of the model.

An edit takes (B, T, D), a vector for each token of the batch. Most models compute that
everywhere; some flatten it within a layer, pad it, or put other vectors beside it.

Shapes: B batch, T tokens, D size, C columns of which T are tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig


class Layout(Enum):
    """The order of the columns in a model's hidden states."""

    TOKENS_ALONE = "(B, T, D)"
    TOKENS_FIRST = "(B, C, D), of which the first T are tokens"
    TOKENS_LAST = "(B, C, D), of which the last T are tokens"
    TIME_FIRST = "(T, B, D)"


# By the model type of the text model's config. A shape alone cannot tell some of these
# apart; models that are not listed need TOKENS_ALONE.
_LAYOUTS = {
    "big_bird": Layout.TOKENS_FIRST,  # padded inside to whole blocks
    "longformer": Layout.TOKENS_FIRST,  # padded inside to whole windows
    "xlnet": Layout.TIME_FIRST,
}


def layout_of(config: PretrainedConfig) -> Layout:
    """Return the layout of a text model's hidden states."""
    return _LAYOUTS.get(config.model_type, Layout.TOKENS_ALONE)


class TokenVectors(NamedTuple):
    """The vectors of a batch's tokens, and how to put others in their place."""

    h_BTD: Tensor
    put_back: Callable[[Tensor], Tensor]


def token_vectors(
    h: Tensor, shape: tuple[int, int, int], layout: Layout
) -> TokenVectors | None:
    """Return the vectors of a batch's tokens in a tensor inside of the model; None
    where they cannot be told.

    Args:
        shape: (B, T, D) of the batch and of what is edited.
    """
    rows, width, size = shape
    if h.ndim == 2 and h.shape[1] == size and h.shape[0] % rows == 0:
        sizes = (-1, rows) if layout is Layout.TIME_FIRST else (rows, -1)
        found = token_vectors(h.unflatten(0, sizes), shape, layout)
        if found is None:
            return None
        h_BTD, put_back = found
        return TokenVectors(h_BTD, lambda new_BTD: put_back(new_BTD).flatten(0, 1))
    if layout is Layout.TIME_FIRST:
        if h.shape != (width, rows, size):
            return None
        return TokenVectors(h.transpose(0, 1), lambda new_BTD: new_BTD.transpose(0, 1))
    if h.shape == shape:
        return TokenVectors(h, lambda new_BTD: new_BTD)
    others = h.shape[1] - width if h.ndim == 3 else 0
    if (
        layout is Layout.TOKENS_ALONE
        or others <= 0
        or h.shape != (rows, width + others, size)
    ):
        return None
    start = 0 if layout is Layout.TOKENS_FIRST else others
    before, h_BTD, after = h.split([start, width, others - start], 1)
    return TokenVectors(h_BTD, lambda new_BTD: torch.cat([before, new_BTD, after], 1))
