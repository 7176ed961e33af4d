"""Find out from the call stack which axolotl command is running.

axolotl tells its plugins in no other way: ``evaluate`` sets nothing in the config,
``inference`` only a key that validation drops, ``quantize`` neither.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

_INFERENCE = {"axolotl.evaluate", "axolotl.cli.utils.load"}
_COMMAND_LINE = "axolotl.cli.main"
_OVERRIDE = re.compile(r"--(?:lo)?reft[^=]*", re.IGNORECASE)


def is_inference() -> bool:
    """Whether the model is loaded for inference or evaluation, not for training."""
    return not _INFERENCE.isdisjoint(_running_modules())


def is_running(module: str) -> bool:
    """Whether a function of ``module`` is in the call stack."""
    return module in _running_modules()


def warn_of_no_evaluation(cfg: Any) -> None:
    """Warn where ``axolotl evaluate`` has no data but the training's."""
    if is_running("axolotl.evaluate") and not (cfg.val_set_size or cfg.test_datasets):
        LOG.warning(
            "axolotl evaluate without val_set_size and test_datasets: it computes the "
            "loss of the training data (train_loss), and no eval_loss. Write "
            "test_datasets: with other data, as under datasets:, or val_set_size: as "
            "in training"
        )


def check_overrides() -> None:
    """Refuse settings of the block on axolotl's command line.

    It passes options that it does not know to the launcher, or drops them.

    Raises:
        ValueError: the option, and how to pass it.
    """
    if not is_running(_COMMAND_LINE):
        return
    for argument in sys.argv[1:]:
        if match := _OVERRIDE.match(argument):
            raise ValueError(
                f"{match[0]}: axolotl's command line does not pass on settings of the "
                "loreft: block; write it in the YAML, or run for example python -m "
                "axolotl.cli.train config.yml --loreft__rank=2"
            )


def _running_modules() -> Iterator[str]:
    """Names of the modules in the call stack, also of one run by ``python -m``."""
    frame = sys._getframe()
    while frame is not None:
        spec = frame.f_globals.get("__spec__")
        yield spec.name if spec else frame.f_globals.get("__name__", "")
        frame = frame.f_back  # type: ignore[assignment]
