"""Find out from the call stack which axolotl command is running.

axolotl tells its plugins in no other way: ``evaluate`` sets nothing in the config,
``inference`` only a key that validation drops, ``quantize`` neither.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl_reft.training.vllm_server import serve_command, training_command
from axolotl_reft.tuner.config import LoreftConfig

_REFUSED = {
    "merge-lora": "a LoReFT adapter cannot be merged into the base model; load it "
    "beside the base with PeftModel.from_pretrained",
    "quantize": "output_dir holds only an adapter; to quantise the base, use a config "
    "without adapter: and loreft:",
    "vllm-serve": "it serves base_model and loads no adapter; start vLLM in an "
    "environment of its own, with axolotl-reft[vllm] there:",
    "merge-sharded-fsdp-weights": "it would round the adapter to bfloat16; train with "
    "fsdp_config: final_state_dict_type: FULL_STATE_DICT to save it whole",
}


def is_running(*modules: str) -> bool:
    """Return whether a function of one of the modules is in the call stack."""
    scopes = [frame.f_globals for frame, _ in traceback.walk_stack(sys._getframe())]
    # A module run by `python -m` is named in its spec alone.
    names = {getattr(s.get("__spec__"), "name", s.get("__name__")) for s in scopes}
    return not names.isdisjoint(modules)


def is_inference() -> bool:
    """Return whether the model is loaded for inference or evaluation."""
    return is_running("axolotl.evaluate", "axolotl.cli.utils.load")


def check_command(settings: Mapping[str, Any]) -> None:
    """Refuse commands that cannot work, and settings of the block as options."""
    is_loreft = settings.get("adapter") == "loreft"
    for command, reason in _REFUSED.items() if is_loreft else ():
        if is_running("axolotl.cli." + command.replace("-", "_")):
            if command == "vllm-serve":
                reason = f"{reason}\n{_serve_command(settings)}"
            raise ValueError(f"axolotl {command} with adapter: loreft: {reason}")
    # axolotl passes options that it does not know to the launcher, or drops them.
    for argument in sys.argv[1:] if is_running("axolotl.cli.main") else ():
        if match := re.match(r"(?i)--(?:lo)?reft[^=]*", argument):
            raise ValueError(
                f"{match[0]}: axolotl's command line does not pass on settings of the "
                "loreft: block; write it in the YAML, or run for example python -m "
                "axolotl.cli.train config.yml --loreft__rank=2"
            )


def _serve_command(settings: Mapping[str, Any]) -> str:
    block = {k: v for k, v in (settings.get("loreft") or {}).items() if k == "rank"}
    base, rank = str(settings.get("base_model")), LoreftConfig(**block).rank
    if settings.get("rl"):
        return training_command(base, rank)
    out = str(settings.get("output_dir", "OUTPUT_DIR"))
    return serve_command(base, rank, "--lora-modules", f"{Path(out).name}={out}")
