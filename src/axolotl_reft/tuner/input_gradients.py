"""Where backward goes: not into the frozen layers below the first edited one, and
through all of those above."""

from __future__ import annotations

from transformers import PreTrainedModel

_PACKS = "support_avx512bf16_for_cpu"


def enable_input_grads(model: PreTrainedModel, prefix: str) -> None:
    """Make the embeddings' output require a gradient where other parameters are trained
    than those with the adapter's prefix.

    Transformers, PEFT and axolotl ask for it wherever an adapter meets checkpointing,
    and backward then runs through every layer. Reentrant checkpointing needs it for
    trained weights inside of layers; LoReFT's see to it themselves (``replay.py``).
    """
    if any(p.requires_grad and prefix not in n for n, p in model.named_parameters()):
        type(model).enable_input_require_grads(model)


def keep_from_packing(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing the weights of a base that is trained through.

    On a CPU with instructions for bfloat16 it (0.50) packs 4-bit weights at the first
    evaluation, for a kernel without a backward, which it takes in training ever after.

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
                f"{name} of the base was packed by bitsandbytes when it was evaluated, "
                "for a kernel without gradients; load the base anew, and make the "
                "adapter before anything is computed"
            )
