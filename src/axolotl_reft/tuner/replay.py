"""Gradient checkpointing of a layer with edits or LoRA inside it.

Checkpointing runs the layer again in backward, when another forward may be under way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from axolotl_reft.tuner.context import ModelState

_ATTRIBUTE = "_gradient_checkpointing_func"


def call_with_context(
    layer: nn.Module, state: ModelState, *args: Any, **kwargs: Any
) -> Any:
    """Call a layer that checkpointing will replay with the context of this forward."""
    checkpoint = layer.__dict__.get(_ATTRIBUTE)
    if checkpoint is None or not layer.training:
        return layer(*args, **kwargs)
    context = state.thread.context

    def checkpoint_with_context(
        function: Callable[..., Any], *inputs: Any, **options: Any
    ) -> Any:
        def function_with_context(*args: Any, **kwargs: Any) -> Any:
            if is_compiling():  # the graph holds the positions
                return function(*args, **kwargs)
            thread = state.thread
            outer, thread.context = thread.context, context
            try:
                return function(*args, **kwargs)
            finally:
                thread.context = outer

        # Reentrant checkpointing gives parameters inside a layer a gradient only if an
        # input requires one, and below the first edit none does.
        settings = getattr(checkpoint, "keywords", {})  # of a partial of torch's
        is_reentrant = settings.get("use_reentrant", True) is not False
        if is_reentrant and torch.is_grad_enabled() and not is_compiling():
            if not any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
                inputs = (inputs[0].detach().requires_grad_(), *inputs[1:])
        return checkpoint(function_with_context, *inputs, **options)

    # Patch: transformers' layer calls this with its own forward, and nothing else
    # stands between the two.
    layer.__dict__[_ATTRIBUTE] = checkpoint_with_context
    try:
        return layer(*args, **kwargs)
    finally:
        layer.__dict__[_ATTRIBUTE] = checkpoint
