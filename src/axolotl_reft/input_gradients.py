"""Keeps backward out of the frozen layers below the first edited one.

Transformers, PEFT and axolotl make the embeddings' output require a gradient wherever
an adapter meets gradient checkpointing (axolotl: wherever there is an adapter). With
it, backward runs through every layer. Reentrant checkpointing needs it for trained
weights inside of layers; LoReFT's are outside, or see to it themselves (``layer.py``).
"""

from __future__ import annotations

from functools import partial

from transformers import PreTrainedModel

_METHOD = "enable_input_require_grads"


def spare_frozen_layers(model: PreTrainedModel, prefix: str) -> None:
    """Leave the embeddings' output alone while nothing but the adapter is trained.

    Args:
        model: the base model.
        prefix: what the names of the adapter's parameters hold.
    """
    if hasattr(model, _METHOD):
        model.disable_input_require_grads()
        model.__dict__[_METHOD] = partial(_enable, model, prefix)


def treat_as_usual(model: PreTrainedModel) -> None:
    """Undo :func:`spare_frozen_layers`."""
    model.__dict__.pop(_METHOD, None)


def _enable(model: PreTrainedModel, prefix: str) -> None:
    others = (
        parameter.requires_grad and prefix not in name
        for name, parameter in model.named_parameters()
    )
    if any(others):
        getattr(type(model), _METHOD)(model)
