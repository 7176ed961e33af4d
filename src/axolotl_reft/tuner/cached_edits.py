"""Columns of a cache: how many there are, and whether they were edited as a prompt asks
that goes on with them.

Shapes: B batch, W columns of the cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from axolotl_reft.prompts.cached import Adapters, CacheRecord
from axolotl_reft.prompts.spans import PromptSpans
from axolotl_reft.prompts.turns import Turns
from axolotl_reft.tuner.context import BASE, ModelState


def columns_in(cache: Any) -> int:
    """Return the number of columns in a cache. A recurrent state does not tell: where
    it is filled, it is the recorded number, or 1."""
    if cache is None:
        return 0
    if isinstance(cache, Cache):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # no layer of it keeps keys
            is_filled = cache.has_previous_state()
    else:
        offset = getattr(cache, "seqlen_offset", None)
        is_filled = len(cache) > 0 if offset is None else offset > 0
    record = CacheRecord.of(cache)
    return (record.computed if record else 1) if is_filled else 0


def record_of(cache: Any, past: int, rows: int) -> CacheRecord | None:
    """Return the record of a cache, if it is one of so many columns and rows, each of
    one sample."""
    record = CacheRecord.of(cache)
    if record is None or record.computed < past or record.is_packed:
        return None
    return record.of_rows(rows)


def has_rows(cache: Any, rows: int) -> bool:
    """Whether a cache of so many rows is known and of kinds of which :func:`rows_of`
    makes others: a forward replaces keys and values, and they keep nothing else."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    if type(cache) is not DynamicCache:  # MiniMax's keeps states, too
        return False
    if any(type(layer) not in kinds for layer in cache.layers):
        return False
    return record_of(cache, columns_in(cache), rows) is not None


def rows_of(cache: Cache, rows: Tensor) -> Cache:
    """Return a cache of these rows of another, which may be repeated and stays as it
    is, with its record."""
    made, record = copy.copy(cache), CacheRecord.of(cache)
    assert record is not None, "has_rows comes first"
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers:
        if layer.is_initialized:
            layer.batch_select_indices(rows.to(layer.device))
    CacheRecord.put(made, record.selected(rows))
    return made


def fitting_columns(
    state: ModelState,
    record: CacheRecord,
    read: Callable[[Turns], PromptSpans],
    adapters: Adapters,
    past: int,
) -> int:
    """Return how many of the first ``past`` cached columns were edited as these
    adapters would without a cache, with prompts as they are read now."""
    differs_BW = torch.zeros(record.rows, past, dtype=torch.bool)
    before = [name for r in record.readings for name in r.adapters.names]
    for name in {*before, *adapters.names} - {BASE}:
        if name not in state.adapters:  # deleted since
            return 0
        new_BW = _edit_codes(state, name, read, adapters, record.rows, past)
        old_BW = torch.zeros_like(new_BW)
        for start, seen, then in record.readings:
            codes_BW = _edit_codes(state, name, seen.spans, then, record.rows, past)
            old_BW[:, start:] = codes_BW[:, start:]
        differs_BW |= new_BW != old_BW
    found = differs_BW.any(0).nonzero()
    return int(found[0]) if len(found) else past


def _edit_codes(
    state: ModelState,
    name: str,
    read: Callable[[Turns], PromptSpans],
    adapters: Adapters,
    rows: int,
    columns: int,
) -> Tensor:
    """Return a number for each of the first columns (B, W): 0 where the adapter does
    nothing, elsewhere what it does, with the strength in the imaginary part."""
    spec, codes_BW = state.adapters[name], torch.zeros(rows, columns)
    changes_all = name in state.change_every_token
    # At 0 nothing is edited, but trained embeddings have no strength.
    weights = [
        0 if s is None or (s == 0 and not changes_all) else 1 + 1j * s
        for s in adapters.rows(name, rows)
    ]
    weights_B1 = torch.tensor(weights, dtype=torch.complex128).unsqueeze(1)
    if not any(weights):
        return codes_BW * weights_B1
    if changes_all:
        codes_BW += 4
    if not spec.positions.everywhere:
        masks_BW = read(spec.turns).columns(0, columns).edited(spec.positions)
        prefix_BW, suffix_BW = (mask_BW.to("cpu") for mask_BW in masks_BW)
        codes_BW += prefix_BW + suffix_BW * (1 if spec.tied else 2)
    return codes_BW * weights_B1


def cut_back(cache: Any, past: int, keep: int, omitted: int) -> int:
    """Drop the cached columns after the first ``keep``, or all where no part can be
    kept; return the number of those that are left.

    Raises:
        ValueError: the cache cannot be cut, and is as it was; or more would go than
            the caller passes again, who omitted so many columns.
    """
    layers = getattr(cache, "layers", None)
    for left in sorted({keep, 0}, reverse=True):
        stays = [layer for layer in layers or () if not _can_be_cut(layer, left)]
        if left < omitted or layers is None or stays:
            continue
        for layer in layers:
            if isinstance(layer, DynamicLayer):
                layer.crop(left - past)
            else:
                layer.reset()
        return left
    reason = f"the first {omitted} tokens were not passed again"
    if not omitted:
        name = type(stays[0] if stays else cache).__name__
        reason = f"a {name} cannot be cut back"
    raise ValueError(
        f"past_key_values: the cached columns from {keep} on were edited for another "
        f"prompt or adapter, or it is unknown how, and {reason}; pass a fresh cache "
        "and the whole conversation"
    )


def _can_be_cut(layer: Any, keep: int) -> bool:
    if isinstance(layer, DynamicSlidingWindowLayer):
        is_whole = layer.get_seq_length() < layer.sliding_window
        return type(layer) is DynamicSlidingWindowLayer and is_whole
    if isinstance(layer, DynamicLayer):  # not a quantised one, nor with a state
        return type(layer) in (DynamicLayer, DynamicIndexedLayer)
    return keep == 0 and isinstance(layer, (StaticLayer, LinearAttentionLayer))
