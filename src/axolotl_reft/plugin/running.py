"""Which axolotl command is running, and those that an adapter cannot serve.

axolotl tells its plugins in no other way: ``evaluate`` sets nothing in the config,
``inference`` only a key that validation drops, ``quantize`` neither.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from axolotl.utils.logging import get_logger

from axolotl_reft.tuner.layer import cannot_merge

LOG = get_logger(__name__)

_MODULES_THAT_ANSWER = {"axolotl.evaluate", "axolotl.cli.utils.load"}
_COMMAND_LINE = "axolotl.cli.main"
_OVERRIDE = re.compile(r"--(?:lo)?reft[^=]*", re.IGNORECASE)

_REFUSED = {
    "axolotl.cli.merge_lora": f"axolotl merge-lora: {cannot_merge()}",
    "axolotl.cli.quantize": "axolotl quantize with adapter: loreft: it writes the "
    "weights of a whole model, and output_dir holds an adapter, a few megabytes that "
    "stay in float32. To quantise the base itself, use a config without adapter: and "
    "loreft:",
    "axolotl.cli.vllm_serve": "axolotl vllm-serve with adapter: loreft: vLLM would "
    "serve base_model without the adapter. Answer with axolotl inference, or in Python "
    "with PeftModel.from_pretrained(base, output_dir).generate(...)",
    "axolotl.cli.merge_sharded_fsdp_weights": "axolotl merge-sharded-fsdp-weights with "
    "adapter: loreft: it rounds what it merges to bfloat16, in which an adapter's "
    "rotations are not exact, and writes no adapter_config.json. Train with "
    "fsdp_config: final_state_dict_type: FULL_STATE_DICT, which leaves the whole "
    "adapter in output_dir",
}


def answers() -> bool:
    """Whether the model is being loaded to answer with, and not to be trained."""
    return not _MODULES_THAT_ANSWER.isdisjoint(_running_modules())


def is_running(module: str) -> bool:
    """Whether a function of ``module`` is in the call stack."""
    return module in _running_modules()


def warn_of_no_evaluation(cfg: Any) -> None:
    """Say that ``axolotl evaluate`` has the training data alone, where it has."""
    if is_running("axolotl.evaluate") and not (cfg.val_set_size or cfg.test_datasets):
        LOG.warning(
            "axolotl evaluate without val_set_size and test_datasets: it computes the "
            "loss of the training data (train_loss), and no eval_loss. Write "
            "test_datasets: with other data, as under datasets:, or val_set_size: as "
            "in training"
        )


def check_command(adapter: Any) -> None:
    """Refuse the commands that an adapter cannot serve, and options they would drop.

    Raises:
        ValueError: the command, why not, and the remedy.
    """
    modules = set(_running_modules())
    if adapter == "loreft":
        for module, reason in _REFUSED.items():
            if module in modules:
                raise ValueError(reason)
    # axolotl's own command line takes unknown options for the launcher's, and drops
    # them where there is none.
    if _COMMAND_LINE in modules:
        for argument in sys.argv[1:]:
            if match := _OVERRIDE.match(argument):
                raise ValueError(
                    f"{match[0]}: axolotl's command line does not pass on settings "
                    "of the loreft: block; write it in the YAML, or run for example "
                    "python -m axolotl.cli.train config.yml --loreft__rank=2"
                )


def _running_modules() -> Iterator[str]:
    """The modules of the call stack; by their own names under ``python -m`` as well."""
    frame = sys._getframe()
    while frame is not None:
        spec = frame.f_globals.get("__spec__")
        yield spec.name if spec else frame.f_globals.get("__name__", "")
        frame = frame.f_back  # type: ignore[assignment]
