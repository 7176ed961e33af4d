"""Bases whose layers read what other layers computed, under gradient checkpointing.

Gemma 3n and Gemma 4 share keys and values between layers, outside of the layers'
inputs. Reentrant checkpointing computes a layer without gradients at first, so that
those of the shared keys and values are lost, with LoRA as with LoReFT.
"""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel


def shares_keys_and_values(config: PretrainedConfig) -> bool:
    """Whether layers read the keys and values of another layer."""
    return bool(getattr(config.get_text_config(), "num_kv_shared_layers", None))


def refuse_reentrant_checkpointing(model: PreTrainedModel) -> None:
    """Raise ValueError if reentrant checkpointing is on, and would lose gradients."""
    for module in model.modules() if shares_keys_and_values(model.config) else ():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        settings = getattr(checkpoint, "keywords", {})
        is_on = getattr(module, "gradient_checkpointing", False)
        if is_on and checkpoint and settings.get("use_reentrant") is not False:
            raise ValueError(
                f"use_reentrant: {settings.get('use_reentrant')}: layers of "
                f"{type(model).__name__} share keys and values "
                "(num_kv_shared_layers), whose gradients reentrant checkpointing "
                "loses; pass gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
