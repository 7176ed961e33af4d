"""LoReFT as a PEFT method and as an axolotl adapter.

Importing the package registers the method ``LOREFT`` with PEFT; it imports neither
axolotl nor pyreft.
"""

from importlib import import_module
from typing import Any

from axolotl_reft.chat_template import turn_markers
from axolotl_reft.config import LoreftConfig
from axolotl_reft.labelled_logits import LabelledLogits
from axolotl_reft.model import LoreftModel
from axolotl_reft.prompt_counts import PromptCounter
from axolotl_reft.registration import register_loreft
from axolotl_reft.wording import did_you_mean

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
    "from_pyreft": "axolotl_reft.pyreft_format",
    "to_pyreft": "axolotl_reft.pyreft_format",
}

register_loreft()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}."
        f"{did_you_mean(name, tuple(__all__))}"
    )
