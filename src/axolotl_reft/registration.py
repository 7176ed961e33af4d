"""LOREFT in PEFT's tables of methods."""

from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from axolotl_reft.saved.card import extend_pefts_cards
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.model import LoreftModel
from axolotl_reft.tuner.peft_type import LOREFT
from axolotl_reft.tuner.trained_modules import save_modules_once


def register_loreft() -> None:
    """Make LOREFT a PEFT method; again is harmless."""
    if LOREFT not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=LOREFT.value.lower(),
            config_cls=LoreftConfig,
            model_cls=LoreftModel,
            prefix=LoreftModel.prefix,
        )
    extend_pefts_cards()
    save_modules_once()
