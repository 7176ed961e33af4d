"""Log edit sizes and gradient norms by group of layers, beside the trainer's loss.

Steps that are not logged are not watched, and the host never waits in them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from axolotl_reft.core.interventions import edit_sizes
from axolotl_reft.tuner.layer import interventions_of

# More layers than this are logged in thirds.
_MAX_LAYERS = 4


def layer_groups(layers: list[int]) -> dict[str, list[int]]:
    """Group edited layers, each alone or in thirds, by the name in the log."""
    if len(layers) <= _MAX_LAYERS:
        return {f"layer_{layer}": [layer] for layer in layers}
    ends = [round(part * len(layers) / 3) for part in range(4)]
    thirds = [layers[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    return {f"layers_{third[0]}-{third[-1]}": third for third in thirds}


class EditLog(TrainerCallback):
    """Adds ``loreft/edit_size/…`` and ``loreft/grad_norm/…`` to what a trainer logs.

    The edit size is the mean of ‖Φ(h)−h‖/‖h‖ over the tokens edited in the logged step,
    of this process alone, dropout included. The gradient norm is the step's, before
    clipping as the trainer's ``grad_norm``; it is left out where gradients are sharded.

    Args:
        trainer: its ``log`` is extended, so that every reporter gets the values.
    """

    def __init__(self, trainer: Any) -> None:
        self._model = trainer.model
        found = list(interventions_of(trainer.model, "default"))
        groups = layer_groups(sorted({layer for layer, *_ in found}))
        self._modules: dict[str, list[Any]] = {
            name: [place.intervention for place in found if place.layer in layers]
            for name, layers in groups.items()
        }
        self._watched: list[Any] = []
        self._sizes: dict[str, list[Tensor]] = {}
        self._norms: dict[str, Tensor] = {}
        log: Callable[..., None] = trainer.log

        @wraps(log)
        def log_with_edits(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                logs.update(self._collect(logs.get("grad_norm")))
            log(logs, *args, **kwargs)

        # Patch: a callback sees the logs only after the reporters before it.
        trainer.log = log_with_edits

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.on_train_end()
        if will_log(args, state) and not args.torch_compile:
            for group, modules in self._modules.items():
                sizes = self._sizes[group] = []
                for module in modules:
                    # A forward hook would keep the kernels from making the edit.
                    module.on_edit = partial(_record, module, sizes)
                    self._watched.append(module)

    def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self._unwatch()
        if will_log(args, state):
            self._norms = self._gradient_norms()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._unwatch()
        self._sizes, self._norms = {}, {}

    def _unwatch(self) -> None:
        while self._watched:
            self._watched.pop().on_edit = None

    def _gradient_norms(self) -> dict[str, Tensor]:
        """Return norms by group, and of all trained parameters under the empty name."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        if any(p.grad is None or isinstance(p.grad, DTensor) for p in trained):
            return {}
        gradients = {"": [p.grad for p in trained]}
        for group, modules in self._modules.items():
            parameters = (p for module in modules for p in module.parameters())
            gradients[group] = [p.grad for p in parameters if p.grad is not None]
        return {name: get_total_norm(g) for name, g in gradients.items() if g}

    def _collect(self, total: float | None) -> dict[str, float]:
        """Convert to floats what was recorded, which the host has to wait for.

        Args:
            total: the trainer's norm of all gradients, by which ours are scaled:
                clipping and float16's loss scale change every norm by one factor.
        """
        values = {}
        for name, sizes in self._sizes.items():
            if sizes:
                mean = torch.nanmean(torch.cat([size.cpu() for size in sizes]))
                values[f"loreft/edit_size/{name}"] = float(mean)
        norms = {name: float(norm) for name, norm in self._norms.items()}
        scaled_total = norms.pop("", 0.0)
        factor = total / scaled_total if total and scaled_total else 1.0
        for name, norm in norms.items():
            values[f"loreft/grad_norm/{name}"] = norm * factor
        return values


def _record(
    module: nn.Module, sizes: list[Tensor], before: Tensor, after: Tensor
) -> None:
    # Skip evaluation, generation, and the first forward of a checkpointed layer.
    if module.training and torch.is_grad_enabled():
        sizes.append(edit_sizes(before, after).flatten())


def will_log(args: Any, state: Any) -> bool:
    """Whether the trainer's ``DefaultFlowCallback`` will log the current step."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0
    if args.logging_strategy == IntervalStrategy.EPOCH and args.num_train_epochs:
        return step % max(round(state.max_steps / args.num_train_epochs), 1) == 0
    return False
