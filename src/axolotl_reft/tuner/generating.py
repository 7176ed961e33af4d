"""The methods of one model by which ``generate`` tells its prompt and its steps.

Shapes: B batch, P columns handed to ``generate``, W columns seen so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from axolotl_reft.prompts.cached import CacheRecord
from axolotl_reft.prompts.generation import Generation
from axolotl_reft.tuner import prompt_sources
from axolotl_reft.tuner.cached_edits import (
    columns_in,
    cut_back,
    fitting_columns,
    record_of,
)
from axolotl_reft.tuner.compat import cache_of
from axolotl_reft.tuner.context import ModelState, repeat_rows
from axolotl_reft.tuner.prompt_sources import tokens_of

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class GenerateHooks:
    """Replaces methods of one model for the time that it has adapters."""

    def __init__(self, model: PreTrainedModel, state: ModelState) -> None:
        self._model, self._state = model, state

    def methods(self) -> dict[str, Callable[..., Any]]:
        return {
            "generate": self._generate,
            "prepare_inputs_for_generation": self._prepare_inputs,
            "init_continuous_batching": self._init_continuous_batching,
        }

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        thread, generation = self._state.thread, self._begin(args, kwargs)
        given = cache_of(kwargs)
        CacheRecord.put(given, None)  # what an error would leave in it is unknown
        outer, thread.generation = thread.generation, generation
        try:
            output = type(self._model).generate(self._model, *args, **kwargs)
        finally:
            thread.generation, thread.step = outer, None
        cache = cache_of(output) or given
        if cache is not None:
            sequences = getattr(output, "sequences", output)
            CacheRecord.put(cache, generation.recorded(sequences))
        return output

    def _begin(self, args: Args, kwargs: Kwargs) -> Generation:
        """Read what ``generate`` is asked to go on with; cut an ill-fitting cache."""
        names = ("inputs_embeds", "inputs", "input_ids")
        given = [*args[:1], *(kwargs.get(name) for name in names)]
        first = next((value for value in given if value is not None), None)
        rows, width = (1, 1) if first is None else first.shape[:2]
        row_adapters = self._state.thread.row_adapters
        if row_adapters is not None and first is not None:
            repeat_rows(row_adapters, rows, expands=False)  # for its check
        ids_BP = first if first is not None and first.ndim == 2 else None
        mask_BW, cache = _mask_2d(kwargs), cache_of(kwargs)
        adapters = self._state.active_adapters(rows)
        generation = Generation(width, rows, ids_BP, adapters, mask_BW=mask_BW)
        if past := columns_in(cache):
            generation.go_on(record_of(cache, past, rows))
            self._keep_fitting(generation, cache, past)
        return generation

    def _keep_fitting(self, generation: Generation, cache: Any, past: int) -> None:
        """Keep the cached columns that are as they would be without the cache. Without
        adapters a cache that they had no part in is the base's own business."""
        keep, record = past, generation.record
        if generation.adapters.names or record is not None:
            rows, device = generation.rows, self._model.device
            read = partial(generation.prompts, rows=rows, device=device)
            # The prompt's last token is computed: its logits are the answer's first.
            keep = min(past, generation.width - 1, generation.same_columns())
            if record is not None:
                keep = fitting_columns(
                    self._state, record, read, generation.adapters, keep
                )
            if keep < past:
                keep = cut_back(cache, past, keep, generation.omitted)
        generation.kept = generation.filled = keep

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Kwargs:
        prepare = type(self._model).prepare_inputs_for_generation
        inputs: Kwargs = prepare(self._model, *args, **kwargs)
        thread = self._state.thread
        if thread.generation is not None:
            tokens, has_cache = tokens_of(inputs).shape[1], cache_of(inputs) is not None
            thread.generation.prepare(_mask_2d(kwargs), tokens, has_cache)
            if "target_mapping" in inputs:
                # XLNet has some tokens again, and its query in a column behind them.
                ids_BW = args[0] if args else kwargs["input_ids"]
                thread.generation.go_to(ids_BW.shape[1] + 1 - tokens, tokens)
            thread.step = thread.generation
        return inputs

    def _init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        if any(layer.asks_for_prompts for layer in self._state.layers):
            prompt_sources.refuse_continuous_batching()
        return type(self._model).init_continuous_batching(self._model, *args, **kwargs)


def _mask_2d(kwargs: Mapping[str, Any]) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
