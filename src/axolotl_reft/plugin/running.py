"""Find out from the call stack which axolotl command is running.

axolotl tells its plugins in no other way: ``evaluate`` sets nothing in the config,
``inference`` only a key that validation drops, ``quantize`` neither.
"""

from __future__ import annotations

import re
import sys
import traceback

from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

_REFUSED = {
    "merge-lora": "a LoReFT adapter cannot be merged into the base model: an edit of "
    "hidden states at some positions is no change of weights; load it beside the base "
    "with PeftModel.from_pretrained",
    "quantize": "it quantises a whole model, and output_dir holds only an adapter; to "
    "quantise the base, use a config without adapter: and loreft:",
    "vllm-serve": "vLLM would serve base_model without the adapter; use axolotl "
    "inference, or PeftModel.from_pretrained(base, output_dir).generate(...)",
    "merge-sharded-fsdp-weights": "it rounds the adapter to bfloat16 and writes no "
    "adapter_config.json; train with fsdp_config: final_state_dict_type: "
    "FULL_STATE_DICT, which leaves the whole adapter in output_dir",
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


def check_command(adapter: str | None) -> None:
    """Refuse commands that cannot work, and settings of the block as options.

    axolotl passes options that it does not know to the launcher, or drops them.

    Raises:
        ValueError: the command or the option, and what to do instead.
    """
    for command, reason in _REFUSED.items() if adapter == "loreft" else ():
        if is_running("axolotl.cli." + command.replace("-", "_")):
            raise ValueError(f"axolotl {command} with adapter: loreft: {reason}")
    for argument in sys.argv[1:] if is_running("axolotl.cli.main") else ():
        if match := re.match(r"(?i)--(?:lo)?reft[^=]*", argument):
            raise ValueError(
                f"{match[0]}: axolotl's command line does not pass on settings of the "
                "loreft: block; write it in the YAML, or run for example python -m "
                "axolotl.cli.train config.yml --loreft__rank=2"
            )


def warn_of_no_evaluation(cfg: DictDefault) -> None:
    """Warn where ``axolotl evaluate`` has no data but the training's."""
    if is_running("axolotl.evaluate") and not (cfg.val_set_size or cfg.test_datasets):
        LOG.warning(
            "axolotl evaluate without val_set_size and test_datasets computes the loss "
            "of the training data (train_loss), and no eval_loss; set one of them"
        )
