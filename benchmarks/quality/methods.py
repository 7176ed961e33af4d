"""The adapters that are compared, and the learning rates that each may try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig

from axolotl_reft import LoreftConfig, turn_markers

# Of SmolLM2's 30, four at equal distances.
FOUR_LAYERS = [5, 12, 19, 26]


@dataclass(frozen=True)
class Method:
    """An adapter's settings.

    Attributes:
        settings: of LoreftConfig, or of LoraConfig where there are ``target_modules``.
        learning_rates: as many of each method.
        by_pyreft: whether pyreft's own trainer trains it, with ``positions`` and
            ``rank``.
    """

    settings: Mapping[str, Any]
    learning_rates: tuple[float, ...] = (4e-4, 9e-4, 2e-3)
    by_pyreft: bool = False

    @property
    def is_lora(self) -> bool:
        return "target_modules" in self.settings

    def config(self, tokenizer: Any) -> PeftConfig:
        if self.is_lora:
            return LoraConfig(task_type="CAUSAL_LM", **self.settings)
        markers = turn_markers(tokenizer)
        return LoreftConfig(
            task_type="CAUSAL_LM", turn_markers=markers, **self.settings
        )


def _loreft(**settings: Any) -> Method:
    return Method({"positions": "l7", "rank": 8, **settings})


def _from_identity(**settings: Any) -> Method:
    """Without a random edit to unlearn first, higher rates are stable."""
    loreft = _loreft(init_weights="identity", **settings)
    return Method(loreft.settings, (9e-4, 2e-3, 4e-3))


def _lora(rank: int) -> Method:
    """As axolotl's LoRA with `lora_target_linear`, with alpha twice the rank."""
    settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    return Method(settings, (3e-4, 1e-3, 3e-3))


# In the order in which they are run.
METHODS = {
    "LoReFT l7": _loreft(),
    "LoRA r8": _lora(8),
    "LoReFT f7+l7": _loreft(positions="f7+l7"),
    "LoRA r1": _lora(1),
    "LoReFT all, identity": _from_identity(positions="all"),
    "LoReFT all, identity, rank 4": _from_identity(positions="all", rank=4),
    "LoReFT l7, identity": _from_identity(),
    "LoReFT f7+l7, identity": _from_identity(positions="f7+l7"),
    "LoReFT l7, 4 layers": _loreft(layers=FOUR_LAYERS),
    "LoReFT l7, rank 1": _loreft(rank=1),
    "LoReFT l1": _loreft(positions="l1"),
    "LoReFT l1, rank 4": _loreft(positions="l1", rank=4),
    # The highest rank with a tenth of the parameters of LoRA r8.
    "LoReFT l1, rank 7": _loreft(positions="l1", rank=7),
    "LoReFT all, identity, rank 7": _from_identity(positions="all", rank=7),
    "LoReFT all": _loreft(positions="all"),
    "DiReFT l7": _loreft(intervention="direft"),
    "NoReFT l7": _loreft(intervention="noreft"),
    "LoReFT l7, rank 4": _loreft(rank=4),
    "LoReFT l7, rank 16": _loreft(rank=16),
    "LoReFT f7+l7, untied": _loreft(positions="f7+l7", tied_weights=False),
    "LoReFT f7+l7, 4 layers": _loreft(positions="f7+l7", layers=FOUR_LAYERS),
    "pyreft f7+l7": Method({"positions": "f7+l7", "rank": 8}, by_pyreft=True),
    "pyreft l7": Method({"positions": "l7", "rank": 8}, by_pyreft=True),
}
