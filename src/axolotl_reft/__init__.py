"""LoReFT as a PEFT method and as an axolotl adapter.

Importing the package registers the method ``LOREFT`` with PEFT; it imports neither
axolotl nor pyreft.
"""

from typing import Any

from axolotl_reft.config import LoreftConfig
from axolotl_reft.model import LoreftModel
from axolotl_reft.registration import register_loreft

__all__ = ["LoreftConfig", "LoreftModel", "LoreftPlugin"]

register_loreft()


def __getattr__(name: str) -> Any:
    if name == "LoreftPlugin":
        from axolotl_reft.plugin import LoreftPlugin

        return LoreftPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
