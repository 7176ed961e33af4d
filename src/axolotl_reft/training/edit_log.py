"""Edit sizes and gradient norms in a trainer's own logs, by group of layers.

Nothing is watched, and the host waits for nothing, in steps that are not logged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from axolotl_reft.inspect.edit_size import edit_sizes, named_interventions

# More layers than this are logged in thirds.
_FEW = 4


def layer_groups(layers: list[int]) -> dict[str, list[int]]:
    """Edited layers by the name under which they are logged: each, or thirds."""
    if len(layers) <= _FEW:
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
        trainer: whose ``log`` is extended, so that every reporter gets the numbers.
        adapter: name of the adapter.
    """

    def __init__(self, trainer: Any, adapter: str = "default") -> None:
        self._model = trainer.model
        self._adapter = adapter
        found = list(named_interventions(trainer.model, adapter))
        self._groups = layer_groups(sorted({layer for layer, *_ in found}))
        self._group_of = {n: name for name, ns in self._groups.items() for n in ns}
        self._watched: list[Any] = []
        self._sizes: dict[str, list[Tensor]] = {}
        self._norms: dict[str, Tensor] = {}
        self._extend(trainer)

    def _extend(self, trainer: Any) -> None:
        log: Callable[..., None] = trainer.log

        @wraps(log)
        def log_with_edits(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                logs.update(self._collect(logs.get("grad_norm")))
            log(logs, *args, **kwargs)

        trainer.log = log_with_edits

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._forget()
        if will_log(args, state) and not args.torch_compile:
            for layer, _side, _wrapper, module in self._interventions():
                sizes = self._sizes.setdefault(self._group_of[layer], [])
                # Not by a hook, which would keep the edit from being made by kernels.
                module.on_edit = _noting(module, sizes)
                self._watched.append(module)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, **_: Any
    ) -> None:
        self._unwatch()
        if will_log(args, state):
            self._norms = self._gradient_norms()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._forget()

    def _interventions(self) -> Any:
        return named_interventions(self._model, self._adapter)

    def _unwatch(self) -> None:
        while self._watched:
            self._watched.pop().on_edit = None

    def _forget(self) -> None:
        self._unwatch()
        self._sizes, self._norms = {}, {}

    def _gradient_norms(self) -> dict[str, Tensor]:
        """By group, and of everything trained under the empty name."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        if any(p.grad is None or isinstance(p.grad, DTensor) for p in trained):
            return {}
        gradients: dict[str, list[Tensor]] = {"": [p.grad for p in trained]}
        for layer, _side, _wrapper, module in self._interventions():
            group = gradients.setdefault(self._group_of[layer], [])
            group += [p.grad for p in module.parameters() if p.grad is not None]
        return {name: get_total_norm(some) for name, some in gradients.items() if some}

    def _collect(self, total: float | None) -> dict[str, float]:
        """The numbers as floats: the one place where the host waits."""
        means = {
            name: torch.nanmean(torch.cat([some.cpu() for some in sizes]))
            for name, sizes in self._sizes.items()
            if sizes
        }
        norms = {name: float(norm) for name, norm in self._norms.items()}
        clipped = norms.pop("", 0.0)
        # Clipping, and the scaling of float16, change every norm by one factor.
        factor = total / clipped if total and clipped else 1.0
        values = {f"edit_size/{name}": float(mean) for name, mean in means.items()}
        values |= {f"grad_norm/{name}": norm * factor for name, norm in norms.items()}
        return {f"loreft/{name}": value for name, value in values.items()}


def _noting(module: nn.Module, sizes: list[Tensor]) -> Callable[[Tensor, Tensor], None]:
    def note(before: Tensor, after: Tensor) -> None:
        # Not the forwards of evaluation, of generation, or of a checkpoint's first run.
        if module.training and torch.is_grad_enabled():
            sizes.append(edit_sizes(before, after).flatten())

    return note


def will_log(args: Any, state: Any) -> bool:
    """Whether the trainer logs the step under way, by its ``DefaultFlowCallback``."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0
    if args.logging_strategy == IntervalStrategy.EPOCH and args.num_train_epochs:
        return step % max(round(state.max_steps / args.num_train_epochs), 1) == 0
    return False
