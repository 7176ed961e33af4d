"""LoReFT as a PEFT method and as an axolotl adapter.

Importing the package registers the method ``LOREFT`` with PEFT; it imports neither
axolotl nor pyreft.
"""

from importlib import import_module
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from axolotl_reft.errors import did_you_mean
from axolotl_reft.prompts.templates import turn_markers
from axolotl_reft.saved.card import extend_pefts_cards
from axolotl_reft.training.collators import EditIndexCollator as PromptCounter
from axolotl_reft.training.collators import LabelledLogits
from axolotl_reft.training.trainers import prepare_every_trainer
from axolotl_reft.tuner.config import LOREFT, LoreftConfig
from axolotl_reft.tuner.model import LoreftModel
from axolotl_reft.tuner.trained_modules import save_modules_once

__all__ = [
    "LabelledLogits",
    "LoreftConfig",
    "LoreftModel",
    "LoreftPlugin",
    "PromptCounter",
    "from_pyreft",
    "to_pyreft",
    "turn_markers",
    "use_frozen_prompt",
]
# Imported when asked for: these bring in axolotl, or pyreft.
_LAZY = {
    "LoreftPlugin": "axolotl_reft.plugin",
    "from_pyreft": "axolotl_reft.exchange.live",
    "to_pyreft": "axolotl_reft.exchange.live",
    "use_frozen_prompt": "axolotl_reft.training.frozen_prompt",
}

if LOREFT not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(
        name=LOREFT.value.lower(),
        config_cls=LoreftConfig,
        model_cls=LoreftModel,
        prefix=LoreftModel.prefix,
    )
extend_pefts_cards()
save_modules_once()
prepare_every_trainer()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    hint = did_you_mean(name, tuple(__all__))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}")
