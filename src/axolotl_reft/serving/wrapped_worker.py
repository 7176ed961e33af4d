"""Replacements for functions of vLLM's workers.

Each takes the function that it replaces; ``patches.py`` says which that is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.lora.lora_model import LoRAModel

from axolotl_reft.serving.adapters import is_loreft_number
from axolotl_reft.serving.engine import serves_loreft
from axolotl_reft.serving.runner import LoadedAdapter, ServedModel

Function = Callable[..., Any]


def load_lora_model(original: Function) -> Function:
    """Gives the layers their edits, before anything is compiled."""

    def load_lora_model(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        model = original(self, model, vllm_config, device)
        if serves_loreft(vllm_config):
            self.loreft = ServedModel(model, vllm_config, device)
            self.lora_manager._adapter_manager.loreft = self.loreft
        return model

    return load_lora_model


def clear_rows(original: Function) -> Function:
    """Clears the rows ahead of every step, also of those that only warm up."""

    def _set_active_loras(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if hasattr(self, "loreft"):
            self.loreft.clear_rows()

    return _set_active_loras


def find_rows(original: Function) -> Function:
    """Finds the edited rows of a step."""

    def set_active_loras(
        self: Any, input_batch: Any, num_scheduled_tokens: Any, *args: Any
    ) -> None:
        original(self, input_batch, num_scheduled_tokens, *args)
        if hasattr(self, "loreft"):
            manager = self.lora_manager._adapter_manager
            self.loreft.find_rows(
                input_batch, num_scheduled_tokens, self.requests, manager
            )

    return set_active_loras


def load_adapter(original: Function) -> Function:
    """Reads a LoReFT adapter in the place of LoRA's matrices."""

    def _load_adapter(self: Any, lora_request: Any) -> Any:
        number = lora_request.lora_int_id
        if not is_loreft_number(number):
            return original(self, lora_request)
        model = LoRAModel(number, self.lora_config.max_lora_rank, {})
        model.loreft = LoadedAdapter.read(lora_request.lora_path, number)
        return model

    return _load_adapter


def add_adapter(original: Function) -> Function:
    """Adds adapters without matrices of LoRA, which vLLM fails to merge."""

    def _add_adapter(self: Any, lora: Any) -> None:
        if lora.loras:
            original(self, lora)
        else:
            self._registered_adapters[lora.id] = lora

    return _add_adapter


def activate_adapter(original: Function) -> Function:
    """Puts an adapter's edits into the slot that vLLM gave it."""

    def activate_adapter(self: Any, lora_id: int) -> bool:
        is_new = original(self, lora_id)
        if is_new and is_loreft_number(lora_id):
            slot = self.lora_index_to_id.index(lora_id)
            self.loreft.load(slot, self._registered_adapters[lora_id].loreft)
        return is_new

    return activate_adapter
