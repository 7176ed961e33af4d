"""Finds the vectors of a batch's tokens in a tensor inside of the model.

An edit takes (B, T, D), a vector for each token of the batch. Most models compute that
everywhere; some flatten it within a layer, pad it, or put other vectors beside it.

Shapes: B batch, T tokens, D size, C columns of which T are tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple

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
    "cpmant": Layout.TOKENS_LAST,  # after a prompt of its own
    "git": Layout.TOKENS_LAST,  # after those of the image
    "layoutlmv3": Layout.TOKENS_FIRST,
    "longformer": Layout.TOKENS_FIRST,  # padded inside to whole windows
    "visual_bert": Layout.TOKENS_FIRST,
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
    h: Any, shape: tuple[int, int, int], layout: Layout
) -> TokenVectors | None:
    """Return the vectors of a batch's tokens in a tensor inside of the model; None
    where they cannot be told.

    Args:
        shape: (B, T, D) of the batch and of what is edited.
    """
    if not isinstance(h, Tensor):
        return None
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


def not_told(h: Any, shape: tuple[int, int, int], what: str) -> str:
    """Return what to tell where the vectors of a batch's tokens cannot be told."""
    got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
    return (
        f"LoReFT edits a vector for each token, and the {what} is {got}, where {shape} "
        f"was expected for {shape[0]} rows of {shape[1]} tokens; choose a component "
        "that is of this shape, such as mlp_output or attention_output"
    )


def hidden_states_of(output: Any) -> Any:
    """Return the hidden states among what a module returns; else what it returns."""
    if type(output) in (tuple, list):
        return output[0]
    if isinstance(output, Mapping) and "hidden_states" in output:
        return output["hidden_states"]
    return output


def with_hidden_states(output: Any, h: Tensor) -> Any:
    """Return what a module returns, with other hidden states."""
    if isinstance(output, tuple):
        return h, *output[1:]
    if isinstance(output, list):
        return [h, *output[1:]]
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed["hidden_states"] = h
        return changed
    return h
