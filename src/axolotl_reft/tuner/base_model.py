"""Checks of the model that an adapter is made for, before PEFT changes anything."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain, count

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from axolotl_reft.tuner.layer import LoreftDecoderLayer


def check_base_model(model: nn.Module) -> None:
    """Raise ValueError for a module that is no transformers model with a number and a
    width of layers, or that has an adapter of another PEFT method."""
    name = type(model).__name__
    is_wrapped = isinstance(model, (PeftModel, PeftMixedModel, BaseTuner))
    kinds = {type(m) for m in model.modules() if isinstance(m, BaseTunerLayer)}
    if is_wrapped and kinds == {LoreftDecoderLayer}:
        raise ValueError(
            f"LoReFT edits a transformers model, and got a {name} that has a LoReFT "
            "adapter already; add another with model.add_adapter(name, "
            "LoreftConfig(...)), or begin anew with model.unload()"
        )
    if is_wrapped or kinds - {LoreftDecoderLayer}:
        configs = getattr(model, "peft_config", {}).items()
        adapters = ", ".join(f"{key!r} ({c.peft_type.value})" for key, c in configs)
        raise ValueError(
            f"LoReFT edits a model without adapters of other PEFT methods, and got a "
            f"{name} with {adapters}: PEFT saves and switches the adapters of one "
            "method. Merge them first (merge_and_unload() of their PeftModel), or load "
            "the base without them; LoRA and LoReFT are trained together with "
            "LoreftConfig(lora={...})"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"LoReFT edits a transformers model, and got a {name}; load one with "
            "AutoModelForCausalLM.from_pretrained, and make the adapter before the "
            "model is wrapped (torch.compile, DataParallel)"
        )
    config = model.config.get_text_config()
    for setting in ("num_hidden_layers", "hidden_size"):
        if getattr(config, setting, None) is None:
            raise ValueError(
                f"LoReFT edits a list of layers of one width, and the config of {name} "
                f"has no {setting}; use a causal language model or an encoder"
            )


def free_name(taken: Collection[str]) -> str:
    """Return a name for an adapter that is not taken."""
    names = chain(["default"], (f"adapter_{number}" for number in count(1)))
    return next(name for name in names if name not in taken)
