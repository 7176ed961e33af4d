"""An adapter, and its strength, for each row of a batch: PEFT's ``adapter_names``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from axolotl_reft.settings.strength import read_strength
from axolotl_reft.tuner.context import BASE, ModelState, RowAdapter, repeat_rows

if TYPE_CHECKING:
    from axolotl_reft.tuner.model import LoreftModel


@contextmanager
def adapters_by_row(
    tuner: LoreftModel, state: ModelState, entries: object
) -> Iterator[None]:
    """Edit each row of the batches in this context by its own adapter.

    Args:
        entries: an adapter's name for each row, or its name and a strength.

    Raises:
        TypeError: they are not a list.
        ValueError: an adapter is not there, has modules of its own that others have
            not, or its strength is not a finite number; or the model is in training.
    """
    rows = _read(tuner, state.strengths, entries)
    auxiliary = {
        path: module
        for path, module in tuner.model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    }
    used = {name for name, _ in rows if name != BASE}.union(tuner.active_adapters)
    for path, module in auxiliary.items():
        without = used - module._adapters
        if without and without != used:
            raise ValueError(
                f"adapter_names: {min(without)!r} has no {path} of its own "
                "(modules_to_save) and others have, and PEFT cannot mix them in one "
                "batch; run them one after the other"
            )
    add_names = partial(_add_adapter_names, state)
    handles = [
        module.register_forward_pre_hook(add_names, with_kwargs=True)
        for module in auxiliary.values()
    ]
    thread = state.thread
    thread.row_adapters = rows
    try:
        yield
    finally:
        thread.row_adapters = None
        for handle in handles:
            handle.remove()


def _read(
    tuner: LoreftModel, strengths: Mapping[str, float], entries: object
) -> list[RowAdapter]:
    if not isinstance(entries, (list, tuple)):
        raise TypeError(f"adapter_names: {type(entries)}, expected a list of str")
    if tuner.training:
        raise ValueError(
            "Cannot pass `adapter_names` when the model is in training mode. Call "
            "model.eval() first"
        )
    rows = list[RowAdapter]()
    for entry in entries:
        if isinstance(entry, tuple) and len(entry) == 2:
            name, strength = entry
            setting = f"adapter_names: the strength of {name!r}"
            rows.append((name, read_strength(strength, setting)))
        else:
            rows.append((entry, strengths.get(entry, 1.0)))
    if unknown := {name for name, _ in rows} - {BASE} - tuner.peft_config.keys():
        raise ValueError(
            "adapter_names: non-existing adapter(s): "
            f"{', '.join(sorted(map(str, unknown)))}; there are "
            f"{', '.join(tuner.peft_config)}, and {BASE} for none"
        )
    return rows


def _add_adapter_names(
    state: ModelState, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    rows = state.thread.row_adapters  # None for another thread's batch
    if rows is not None:
        names = [name for name, _ in repeat_rows(rows, len(args[0]))]
        kwargs = kwargs | {"adapter_names": names}
    return args, kwargs
