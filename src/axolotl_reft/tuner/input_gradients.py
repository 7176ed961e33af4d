"""Where backward goes: not into the frozen layers below the first edited one, and
through all of those above.

Transformers, PEFT and axolotl make the embeddings' output require a gradient wherever
an adapter meets gradient checkpointing (axolotl: wherever there is an adapter). With
it, backward runs through every layer. Reentrant checkpointing needs it for trained
weights inside of layers; LoReFT's are outside, or see to it themselves (``replay.py``).

bitsandbytes (0.50) packs 4-bit weights at the first evaluation on a CPU that has
instructions for bfloat16, for a kernel without a backward, and takes that kernel in
training ever after: gradients that pass such a layer are lost.
"""

from __future__ import annotations

from functools import partial

from transformers import PreTrainedModel

_METHOD = "enable_input_require_grads"
_PACKS = "support_avx512bf16_for_cpu"


def spare_frozen_layers(model: PreTrainedModel, prefix: str) -> None:
    """Leave the embeddings' output alone while nothing but the adapter is trained.

    Args:
        prefix: what the names of the adapter's parameters hold.
    """
    if hasattr(model, _METHOD):
        model.disable_input_require_grads()
        # Patch: whoever checkpoints calls this, trained below the first edit or not.
        model.__dict__[_METHOD] = partial(_enable_if_needed, model, prefix)


def treat_as_usual(model: PreTrainedModel) -> None:
    """Undo :func:`spare_frozen_layers`."""
    model.__dict__.pop(_METHOD, None)


def _enable_if_needed(model: PreTrainedModel, prefix: str) -> None:
    if any(p.requires_grad and prefix not in n for n, p in model.named_parameters()):
        getattr(type(model), _METHOD)(model)


def keep_from_packing(model: PreTrainedModel) -> None:
    """Let bitsandbytes compute a base that is trained through without that kernel.

    Raises:
        ValueError: it has packed weights already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, _PACKS):
            continue
        # Patch: bitsandbytes has no setting for this.
        setattr(module, _PACKS, False)
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name}: bitsandbytes packed it when it was evaluated, for a kernel "
                "that computes no gradients; load the base anew, and make the adapter "
                "before anything is computed"
            )
