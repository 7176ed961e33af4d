"""Hints for names of pyreft's and LoRA's that are something else here.

``did_you_mean`` would suggest the wrong one for some: ``noreft`` for ``nodireft``.
"""

from __future__ import annotations

from axolotl_reft.core.kinds import KINDS
from axolotl_reft.errors import did_you_mean

_SUFFIX = "intervention"
_INTERVENTIONS = {
    kind.pyreft_class.lower().removesuffix(_SUFFIX): kind.name
    for kind in KINDS.values()
}

_FROM_BATCH = (
    "which tokens are edited is found in every batch; say which with positions"
)
KEYS = {
    "low_rank_dimension": "here it is rank",
    "share_weights": "here it is tied_weights",
    "position": "here it is positions",
    "intervention_type": "here it is intervention",
    "representations": "here layers, component, rank and intervention are keys",
    "num_interventions": _FROM_BATCH,
    "intervention_locations": _FROM_BATCH,
    "unit_locations": _FROM_BATCH,
    "subspaces": "it has no counterpart here",
    "embed_dim": "remove it, the width is the base model's",
    "add_bias": "remove it, there is no such bias here",
}
_IN_THE_BLOCK = KEYS | {
    "p": "here it is positions",
    "r": "here it is rank",
    "lora_r": "here it is rank",
    "dtype": "remove it, interventions are float32 whatever the base is",
    "lora_alpha": "remove it, an edit has no scale to set",
    "lora_dropout": "here it is dropout",
    "target_modules": "here layers and component say what is edited",
    "lora_target_modules": "here layers and component say what is edited",
}


def hint(key: object, known: tuple[str, ...]) -> str:
    """Return `` low_rank_dimension: here it is rank.``, or the nearest known name."""
    advice = _IN_THE_BLOCK.get(str(key))
    return f" {key}: {advice}." if advice else did_you_mean(key, known)


def intervention_hint(value: object, known: tuple[str, ...]) -> str:
    """Return such a hint for an intervention's name, or for a class of pyreft's."""
    written = str(getattr(value, "__name__", value)).lower()
    ours = _INTERVENTIONS.get(written.removesuffix(_SUFFIX))
    # Alone, "direft" is the paper's name, not short for pyreft's class.
    if ours and written not in (ours, "direft"):
        return f" It is pyreft's name: here it is {ours}."
    return did_you_mean(value, known)
