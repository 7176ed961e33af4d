"""Gradient checkpointing of a layer with edits or LoRA inside it.

Checkpointing runs the layer again in backward, when another forward may be under way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from axolotl_reft.tuner.context import ModelState


def call_replayably(
    layer: nn.Module, state: ModelState, *args: Any, **kwargs: Any
) -> Any:
    """Call a layer that checkpointing will replay with the context of this forward."""
    checkpoint = layer.__dict__.get("_gradient_checkpointing_func")
    if checkpoint is None or not layer.training:
        return layer(*args, **kwargs)

    def checkpoint_with_context(function: Any, *inputs: Any, **options: Any) -> Any:
        if _is_reentrant(checkpoint) and not is_compiling():
            inputs = _with_gradient(inputs)
        return checkpoint(state.replayable(function), *inputs, **options)

    # Patch: transformers' layer calls this with its own forward, and nothing else
    # stands between the two.
    layer.__dict__["_gradient_checkpointing_func"] = checkpoint_with_context
    try:
        return layer(*args, **kwargs)
    finally:
        layer.__dict__["_gradient_checkpointing_func"] = checkpoint


def _is_reentrant(checkpoint: Any) -> bool:
    """Whether a layer's checkpointing function, a ``partial`` of torch's, is."""
    return getattr(checkpoint, "keywords", {}).get("use_reentrant", True) is not False


def _with_gradient(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make an input require a gradient, as below the first edit none does: reentrant
    checkpointing gives parameters inside a layer a gradient only then."""
    if not torch.is_grad_enabled() or any(
        isinstance(value, Tensor) and value.requires_grad for value in inputs
    ):
        return inputs
    return (inputs[0].detach().requires_grad_(), *inputs[1:])
