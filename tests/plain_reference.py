"""A plain way to an adapter's result: hooks on the bare base that edit given tokens."""

import copy
from contextlib import contextmanager
from functools import partial

import torch

from axolotl_reft.tuner.layer import interventions_of
from axolotl_reft.tuner.model import find_decoder_layers


def edited_tokens(prompt, positions="f2+l3"):
    """The tokens of a prompt that each of two interventions edits; of one for all."""
    if positions == "all":
        return [list(range(prompt))]
    first, last = (int(side[1:]) for side in positions.split("+"))
    half = prompt // 2
    return [range(min(first, half)), range(prompt - min(last, half), prompt)]


@contextmanager
def edited_by_hand(
    base, adapter, tokens, place=lambda token: (slice(None), token), strength=1.0
):
    """Yield a copy of the bare base whose layers edit these tokens of every row.

    ``adapter`` is a PEFT model with untied interventions on each layer's output;
    ``place`` is the index of a token in a layer's hidden states.
    """
    copied = copy.deepcopy(base)
    _, layers = find_decoder_layers(copied)
    interventions = {}
    for found in interventions_of(adapter, "default"):
        interventions.setdefault(found.layer, []).append(found.intervention)
    for number, sides in interventions.items():
        layers[number].register_forward_hook(
            partial(_edit, sides, tokens, place, strength)
        )
    with torch.no_grad():
        yield copied


def _edit(interventions, tokens, place, strength, module, args, output):
    h = (output[0] if isinstance(output, tuple) else output).clone()
    for intervention, side in zip(interventions, tokens, strict=True):
        for token in side:
            before = h[place(token)]
            h[place(token)] = before + strength * (intervention(before) - before)
    return (h, *output[1:]) if isinstance(output, tuple) else h
