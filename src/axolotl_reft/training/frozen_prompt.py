"""Have a model compute the frozen part of its prompts apart, and keep it.

Transformers' and TRL's trainers do it by themselves for a model with LoReFT adapters.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from transformers import TrainerCallback

from axolotl_reft.prompts.kept import KeptStates
from axolotl_reft.settings.frozen_prompt import check_frozen_prompt, parse_kept_size
from axolotl_reft.tuner.frozen_prompt import FrozenPrompt
from axolotl_reft.tuner.frozen_reasons import early_positions
from axolotl_reft.tuner.hooks import ModelHooks
from axolotl_reft.tuner.model import hooks_of

# Of the memory that is free: what is kept may take by default, and at most.
_SHARE, _MOST = 0.25, 0.8
# Control groups: of the process, and where they are, by version (2, and 1).
_GROUPS, _CGROUP = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_FILES = {
    "": ("memory.max", "memory.current", "memory.stat"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
}
_IDLE_PAGES = {"": "inactive_file", "memory": "total_inactive_file"}

logger = logging.getLogger(__name__)


def use_frozen_prompt(
    model: Any,
    frozen_prompt: str | bool = "auto",
    cache: Any = None,
    tell: Callable[[str], None] = logger.info,
) -> None:
    """Compute the tokens before the first edited one without gradients, and keep their
    keys and values, in the forwards of a PEFT model with LoReFT adapters.

    Losses, gradients and last hidden states are those of the plain forward. Only with
    ``positions: l<m>`` are there such tokens.

    Args:
        frozen_prompt: ``auto`` where it saves time, True wherever it is possible, False
            nowhere.
        cache: how much is kept, such as ``"8GB"``: by default a quarter of the free
            memory; 0 for nothing; ``{"device": "8GB"}`` in an accelerator's memory.
        tell: called once with what was decided, and why.

    Raises:
        ValueError: a setting is none, or True is not possible.
    """
    hooks = _hooks(model)
    hooks.frozen_prompt_is_chosen = True
    _use(hooks, frozen_prompt, cache, tell)


def use_by_default(model: Any) -> None:
    """Do the same with the defaults, unless it was done for the model before."""
    hooks = _hooks(model)
    if not hooks.frozen_prompt_is_chosen:
        _use(hooks, "auto", None, logger.info)


def _hooks(model: Any) -> ModelHooks:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hooks = hooks_of(base)
    assert hooks is not None, "a model with a LoReFT adapter"
    return hooks


def _use(
    hooks: ModelHooks,
    frozen_prompt: str | bool,
    cache: Any,
    tell: Callable[[str], None],
) -> None:
    specs = hooks.state.adapters.values()
    for spec in specs:
        check_frozen_prompt(frozen_prompt, spec.positions)
    hooks.use_frozen_prompt(None)
    found = [early_positions(spec.positions) for spec in specs]
    early = [text for is_early, text in found if is_early]
    layers = len(list(hooks.model.get_submodule(hooks.layers).children()))
    from_the_first = any(0 in spec.ranks(layers) for spec in specs)
    if frozen_prompt is False or (len(early) == len(specs) and from_the_first):
        reason = "frozen_prompt is false" if frozen_prompt is False else early[0]
        tell(f"frozen prompt: computed with the rest, since {reason}")
        return
    size, device = parse_kept_size(cache), torch.device("cpu")
    if size.on_device:
        device = hooks.backbones[0].device
    limit = size.bytes
    if limit is None or limit:
        free = free_memory(device)
        if device.type == "cpu":
            free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        most = int(free * _MOST)
        limit = int(free * _SHARE) if limit is None else limit
        if limit > most:
            share = f"{most / 1e9:.3g} GB, {_MOST:.0%} of what is free"
            tell(f"frozen_prompt_cache: lowered to {share}")
            limit = most
    hooks.use_frozen_prompt(
        FrozenPrompt(
            *(hooks.model, hooks.backbones, hooks.layers, hooks.state, hooks.prefix),
            *(frozen_prompt, KeptStates(limit, device), tell),
        )
    )


class ForgetKept(TrainerCallback):
    """Gives back the memory of what was kept, when training has ended."""

    def on_train_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        for module in model.modules():
            hooks = hooks_of(module)
            if hooks is not None and hooks.frozen_prompt is not None:
                hooks.frozen_prompt.kept.clear()


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device; on the host, within the control
    groups of the process."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *_free_in_groups()])


def _free_in_groups() -> Iterator[int]:
    """Yield what is free in each control group with a limit, outermost last."""
    groups = _GROUPS.read_text().splitlines() if _GROUPS.exists() else []
    for line in groups:
        _, kind, path = line.split(":", 2)
        if kind not in _FILES:
            continue
        root = _CGROUP / kind
        group = root / path.lstrip("/")
        # A container may name groups that it does not see.
        for directory in (group, *group.parents[: len(Path(path).parts) - 1]):
            try:
                limit, used, stat = (
                    (directory / name).read_text().strip() for name in _FILES[kind]
                )
            except OSError:
                continue
            if limit != "max":
                # Pages of files are given back when memory is short.
                idle = dict(map(str.split, stat.splitlines()))[_IDLE_PAGES[kind]]
                yield int(limit) - int(used) + int(idle)
