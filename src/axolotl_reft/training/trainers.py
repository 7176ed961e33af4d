"""Prepare transformers' and TRL's trainers for the adapter when they are made.

A callback is not given its trainer, and a trainer tells its model nothing.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import CallbackHandler

from axolotl_reft.core.interventions import Intervention
from axolotl_reft.training.answers import note_answers, states_of
from axolotl_reft.training.frozen_prompt import ForgetKept, use_by_default
from axolotl_reft.training.server_generation import generate_with_server
from axolotl_reft.tuner.layer import LoreftDecoderLayer
from axolotl_reft.tuner.lora import LayerLora
from axolotl_reft.tuner.model import LoreftModel


@cache
def prepare_every_trainer() -> None:
    """Prepare each trainer that is made for a model with a LoReFT adapter; again is
    harmless."""
    make = CallbackHandler.__init__

    @wraps(make)
    def make_and_prepare(self: CallbackHandler, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        maker = sys._getframe(1).f_locals.get("self")
        if hasattr(maker, "compute_loss"):
            _prepare(maker, self)

    # Patch: a trainer makes its handler of callbacks once it has its model. The class
    # itself takes long to import, and is often imported after this package.
    CallbackHandler.__init__ = make_and_prepare


def _prepare(trainer: Any, callbacks: CallbackHandler) -> None:
    if not any(isinstance(m, LoreftDecoderLayer) for m in trainer.model.modules()):
        return
    if states_of(trainer):
        note_answers(trainer)
        use_by_default(trainer.model._modules.get("policy", trainer.model))
        callbacks.add_callback(ForgetKept)
    _complete_reference(trainer.model)
    _keep_float32(trainer.model)
    if getattr(trainer.args, "disable_dropout", False):
        disable_dropout(trainer.model)
    if getattr(trainer.args, "use_vllm", False):
        generate_with_server(trainer)


def _complete_reference(model: nn.Module) -> None:
    """Make TRL's "ref" adapter a whole copy of the trained one: TRL copies parameters,
    and a rotation is made of a buffer, its base, as well."""
    parameters = _with_copies(dict(model.named_parameters()))
    # On a quantised base TRL has rounded those that are trained.
    if parameters and all(torch.equal(*map(_rounded, pair)) for pair in parameters):
        for buffer, copy in _with_copies(dict(model.named_buffers())):
            copy.copy_(buffer)


def _with_copies(tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pair an adapter's tensors, by their paths, with those of "ref"."""
    return [
        (tensor, tensors[copy])
        for name, tensor in tensors.items()
        if (copy := name.replace(".default.", ".ref.")) != name and copy in tensors
    ]


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16()


def _keep_float32(model: nn.Module) -> None:
    """Undo that TRL rounds what is trained on a quantised base to bfloat16, in which
    a step's changes would be lost."""
    for name, parameter in model.named_parameters():
        if LoreftModel.prefix in name and parameter.requires_grad:
            parameter.data = parameter.data.float()


def disable_dropout(model: nn.Module) -> None:
    """Set the adapters' dropout to zero: TRL's function finds torch's modules alone."""
    modules = [m for m in model.modules() if isinstance(m, Intervention | LayerLora)]
    if any(module.dropout_p for module in modules):
        warnings.warn(
            "LoReFT: the adapter's dropout is not used, by TRL's disable_dropout",
            UserWarning,
            stacklevel=2,
        )
    for module in modules:
        module.dropout_p = 0.0
