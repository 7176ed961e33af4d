"""pyreft's names for what has another one here, for messages: ``did_you_mean`` would
take some of them for something else, ``nodireft`` for noreft."""

from __future__ import annotations

_CLASSES = {
    "LoreftIntervention": "loreft",
    "NoreftIntervention": "noreft",
    "NodireftIntervention": "direft",
    "DireftIntervention": "orthogonal_direft",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
}
INTERVENTIONS = {
    written: ours
    for theirs, ours in _CLASSES.items()
    # Without the ending direft is the paper's, which is ours, and not pyreft's class.
    for written in (theirs.lower(), theirs.lower().removesuffix("intervention"))
    if written != "direft"
}

_FOUND = "which tokens are edited is found in every batch; say which with positions"
KEYS = {
    "low_rank_dimension": "write rank",
    "r": "write rank",
    "share_weights": "write tied_weights",
    "position": "write positions",
    "p": "write positions",
    "intervention_type": "write intervention",
    "representations": "write layers, component, rank and intervention, each as a key",
    "num_interventions": _FOUND,
    "intervention_locations": _FOUND,
    "unit_locations": _FOUND,
    "subspaces": "it has no counterpart here",
    "embed_dim": "remove it, the width is the base model's",
    "add_bias": "remove it, there is no such bias here",
    "dtype": "remove it, interventions are float32 whatever the base is",
}


def pyreft_key(key: object) -> str:
    """`` It is pyreft's name: write rank.``, or nothing where it is none."""
    advice = KEYS.get(key) if isinstance(key, str) else None
    return f" It is pyreft's name: {advice}." if advice else ""


def pyreft_intervention(value: object) -> str:
    """`` It is pyreft's name: write direft.``, or nothing likewise."""
    name = value.__name__ if isinstance(value, type) else value
    written = name.lower() if isinstance(name, str) else ""
    ours = INTERVENTIONS.get(written, written)
    return "" if ours == written else f" It is pyreft's name: write {ours}."
