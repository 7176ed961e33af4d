"""A worker's side: adapters in its slots, and the edited rows of each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from axolotl_reft.core.affine import AffineStack
from axolotl_reft.serving.adapters import is_loreft_number, load_edits, load_spec
from axolotl_reft.serving.edited_rows import EditedRows, RowsOfEdit
from axolotl_reft.serving.edited_tokens import strength_of, tokens_of
from axolotl_reft.serving.engine import layer_class, served_base
from axolotl_reft.serving.layers import LayerEdits
from axolotl_reft.settings.spec import AdapterSpec


class LoadedAdapter(NamedTuple):
    """An adapter in a worker's memory, with each layer's edits."""

    spec: AdapterSpec
    stacks: Mapping[int, AffineStack]

    @classmethod
    def read(cls, directory: str, number: int) -> LoadedAdapter:
        """Read an adapter; ``ValueError`` if its files have changed."""
        return cls(load_spec(directory, number), load_edits(directory, number))


class ServedModel:
    """A model with edited layers, in the slots of vLLM's LoRA manager."""

    def __init__(
        self, model: nn.Module, vllm_config: Any, device: torch.device
    ) -> None:
        lora, base = vllm_config.lora_config, served_base(vllm_config)
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._rows = EditedRows(tokens, 2 * lora.max_loras, device)
        self._edits = LayerEdits(
            model,
            layer_class(vllm_config),
            base.layers,
            self._rows,
            lora.max_loras,
            lora.max_lora_rank,
            base.hidden_size,
        )

    def load(self, slot: int, adapter: LoadedAdapter) -> None:
        """Put an adapter into a slot of the layers' buffers."""
        self._edits.load(slot, adapter.stacks)

    def clear_rows(self) -> None:
        """Edit nothing in the next step, such as one that only warms up."""
        self._rows.set(())

    def find_rows(
        self,
        batch: Any,
        scheduled_B: NDArray[np.integer],
        requests: Mapping[str, Any],
        manager: Any,
    ) -> None:
        """Find the rows of the next step that are edited.

        Args:
            batch: vLLM's input batch, of B requests.
            scheduled_B: how many tokens of each are in the step.
            requests: states of the requests by their id.
            manager: vLLM's, of the loaded adapters and their slots.
        """
        count = batch.num_reqs
        numbers_B = batch.request_lora_mapping[:count]
        computed_B = batch.num_computed_tokens_cpu[:count]
        in_prompt_B = computed_B < batch.num_prompt_tokens[:count]
        starts_B = np.cumsum(scheduled_B) - scheduled_B
        found: list[RowsOfEdit] = []
        # Few loops over requests, of which there may be hundreds in a decode step.
        for number in filter(is_loreft_number, set(numbers_B.tolist())):
            edit = 2 * manager.lora_index_to_id.index(number)
            spec = manager._registered_adapters[number].loreft.spec
            has_it_B = numbers_B == number
            if spec.positions.everywhere:
                ids = [batch.req_ids[b] for b in has_it_B.nonzero()[0].tolist()]
                strengths_B = np.zeros(count)
                strengths_B[has_it_B] = [strength_of(requests[id]) for id in ids]
                strengths_T = strengths_B.repeat(scheduled_B)
                rows_N = strengths_T.nonzero()[0]
                found.append(RowsOfEdit(edit, rows_N, strengths_T[rows_N]))
                continue
            # A generated token is edited by `positions: all` alone.
            for b in (in_prompt_B & has_it_B).nonzero()[0].tolist():
                request, start = requests[batch.req_ids[b]], int(computed_B[b])
                tokens, strength = tokens_of(request, spec), strength_of(request)
                if strength == 0:
                    continue
                sides = tokens.between(start, start + int(scheduled_B[b]))
                found += [
                    RowsOfEdit(edit + i, rows + starts_B[b], strength)
                    for i, rows in enumerate(sides)
                ]
        self._rows.set(found)
