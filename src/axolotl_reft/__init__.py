"""LoReFT as a PEFT method and as an axolotl adapter.

Importing the package registers the method ``LOREFT`` with PEFT; it imports neither
axolotl nor pyreft.
"""

from importlib import import_module
from typing import Any

from axolotl_reft.errors import did_you_mean
from axolotl_reft.prompts.templates import turn_markers
from axolotl_reft.registration import register_loreft
from axolotl_reft.training.collator import EditIndexCollator as PromptCounter
from axolotl_reft.training.labelled_logits import LabelledLogits
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.model import LoreftModel

__all__ = [
    "LabelledLogits",
    "LoreftConfig",
    "LoreftModel",
    "LoreftPlugin",
    "PromptCounter",
    "from_pyreft",
    "to_pyreft",
    "turn_markers",
]
# Imported when asked for: these bring in axolotl, or pyreft.
_LAZY = {
    "LoreftPlugin": "axolotl_reft.plugin",
    "from_pyreft": "axolotl_reft.exchange.live",
    "to_pyreft": "axolotl_reft.exchange.live",
}

register_loreft()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    hint = did_you_mean(name, tuple(__all__))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}")
