"""How often the host waits for the device in a training step: ours beside the base.

On a GPU by the profiler. Without one on torch's meta device, which has no numbers to
wait for: whatever asks for one there fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.base import Batch, Setting, build_base, packed, rectangle, share
from benchmarks.contestants import CONTESTANTS, Contestant
from benchmarks.harness import Result, Series, hardware, now, versions
from benchmarks.suite import SUITE

_CONTESTANTS = ("floor", "ours", "labelled")
_WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "DtoH")


def synchronisation(size: str) -> Result:
    """Waits in one step, once the first batch has gone by."""
    found = SUITE["step-by-size"].sizes["gpu" if size == "gpu" else "toy"][0]
    series = []
    for samples in (0, 8):
        setting = found.but(samples=samples)
        if size == "gpu":
            series.append(_on_gpu(setting))
        else:
            series.append(_without(setting))
    device = "cuda" if size == "gpu" else "cpu"
    here = {"here": versions()}
    return Result(
        "synchronisation", "waits", "floor", series, here, hardware(device), now()
    )


def _batch(setting: Setting) -> Batch:
    return packed(setting)[0] if setting.samples else rectangle(setting)


def _on_gpu(setting: Setting) -> Series:
    base, values = build_base(setting), {}
    for name in _CONTESTANTS:
        contestant = CONTESTANTS[name](share(base), setting)
        step = _step(contestant, contestant.collate(_batch(setting)))
        step()
        torch.cuda.synchronize()
        with torch.profiler.profile() as profile:
            step()
        waits = [e for e in profile.events() if any(w in e.name for w in _WAITS)]
        values[name] = [float(len(waits))]
    return Series(setting.asdict(), values)


def _step(contestant: Contestant, batch: Batch) -> Callable[[], None]:
    def step() -> None:
        contestant.loss(batch).backward()

    return step


def _without(setting: Setting) -> Series:
    """Rows apart by position ids alone: transformers asks for numbers to mask them."""
    one = Series(setting.asdict() | {"device": "meta"})
    base = build_base(setting)
    for name in _CONTESTANTS:
        contestant = CONTESTANTS[name](share(base), setting)
        batch = contestant.collate(_batch(setting))
        _step(contestant, batch)()
        batch.inputs = {
            k: v.to("meta") if isinstance(v, torch.Tensor) else v
            for k, v in batch.inputs.items()
        }
        _to_meta(contestant.model)
        try:
            with _unmasked():
                _step(contestant, batch)()
        except Exception as error:
            one.failures[name] = f"{type(error).__name__}: {error}"
        else:
            one.values[name] = [0.0]
    return one


def _to_meta(model: nn.Module) -> None:
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            values: dict[str, Any] = table
            for name, value in values.items():
                if value is not None:
                    wanted = value.requires_grad
                    moved = value.detach().to("meta").requires_grad_(wanted)
                    values[name] = nn.Parameter(moved, wanted) if wanted else moved


def _unmasked() -> Any:
    """Without transformers' own question whether a row is packed."""
    from unittest.mock import patch

    from transformers import masking_utils

    return patch.object(
        masking_utils, "find_packed_sequence_indices", lambda position_ids: None
    )
