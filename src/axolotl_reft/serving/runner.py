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
from axolotl_reft.serving.edited_rows import EditedRows
from axolotl_reft.serving.edited_tokens import EditedTokens, Places
from axolotl_reft.serving.engine import layer_class, served_base
from axolotl_reft.serving.layers import LayerEdits
from axolotl_reft.settings.spec import AdapterSpec


class LoadedAdapter(NamedTuple):
    """An adapter in a worker's memory, with each layer's edits."""

    spec: AdapterSpec
    stacks: Mapping[int, AffineStack]


def load_adapter(directory: str, number: int) -> LoadedAdapter:
    """Read an adapter; ``ValueError`` if its files have changed."""
    return LoadedAdapter(load_spec(directory, number), load_edits(directory, number))


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
        numbers_B = batch.request_lora_mapping[: batch.num_reqs]
        if not numbers_B.any():
            self.clear_rows()
            return
        slots, adapters = manager.lora_index_to_id, manager._registered_adapters
        stops_B = np.cumsum(scheduled_B)
        self._rows.set(
            (2 * slots.index(number) + side, rows + stops_B[b] - scheduled_B[b])
            for b, number in enumerate(numbers_B.tolist())
            if is_loreft_number(number)
            for side, rows in enumerate(
                _rows_of(
                    adapters[number].loreft.spec,
                    requests[batch.req_ids[b]],
                    int(batch.num_computed_tokens_cpu[b]),
                    int(scheduled_B[b]),
                )
            )
        )


def _rows_of(
    spec: AdapterSpec, request: Any, computed: int, scheduled: int
) -> list[Places]:
    """Return the edited rows of a request's part of a step, of each intervention."""
    if computed >= len(request.prompt_token_ids) and not spec.positions.everywhere:
        return []
    # As long as the request: a prompt is computed in chunks, or again.
    if not hasattr(request, "loreft_tokens"):
        request.loreft_tokens = EditedTokens(spec, request.prompt_token_ids)
    return request.loreft_tokens.between(computed, computed + scheduled)
