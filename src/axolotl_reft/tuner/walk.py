"""Walks the interventions of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from axolotl_reft.core.interventions import Intervention
from axolotl_reft.tuner.layer import LoreftDecoderLayer


class FoundIntervention(NamedTuple):
    """An intervention and its place: side 1 is the untied suffix's."""

    layer: int
    side: int
    wrapper: LoreftDecoderLayer
    intervention: Intervention


def interventions_of(model: nn.Module, adapter: str) -> Iterator[FoundIntervention]:
    """Yield every intervention of an adapter, in the order of the layers."""
    for path, module in model.named_modules():
        if isinstance(module, LoreftDecoderLayer):
            number = int(path.rpartition(".")[2])
            for side, intervention in enumerate(module.interventions(adapter)):
                yield FoundIntervention(number, side, module, intervention)
