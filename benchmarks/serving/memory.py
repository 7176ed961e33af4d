"""Memory of many adapters at the shape of Llama-3-8B, without its weights."""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from benchmarks.base import Setting, build_base
from benchmarks.contestants import our_config
from benchmarks.harness import Series

# Of a step: --max-num-batched-tokens.
_TOKENS = 8192


class LlamaDecoderLayer(nn.Module):
    """A layer that holds nothing."""

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> Any:
        return hidden, residual


def memory(setting: Setting, count: int) -> tuple[Series, Series]:
    """Return bytes of the buffers for ``count`` adapters and of as many that are
    loaded, and seconds to load each: checked by the front end, read by the worker,
    and put into a slot."""
    from peft import get_peft_model

    from axolotl_reft.serving.adapters import ServedBase, load_spec
    from axolotl_reft.serving.edited_rows import EditedRows
    from axolotl_reft.serving.layers import LayerEdits
    from axolotl_reft.serving.runner import load_adapter

    width, layers, rank = setting.hidden_size, setting.layers, setting.rank
    start = _resident()
    layers_of = nn.Sequential(*(LlamaDecoderLayer() for _ in range(layers)))
    rows = EditedRows(_TOKENS, 2 * count, torch.device("cpu"))
    edits = LayerEdits(layers_of, "LlamaDecoderLayer", layers, rows, count, rank, width)
    buffers = {tensor.data_ptr(): tensor for tensor in layers_of.buffers()}
    served = ServedBase("", width, layers, rank)
    loaded, seconds = [], Series(setting.asdict())
    with TemporaryDirectory() as directory:
        model = get_peft_model(build_base(setting), our_config(setting))
        model.save_pretrained(directory)
        for slot in range(count):
            load_spec.cache_clear()
            times = [time.perf_counter()]
            number = served.read(directory, "adapter").number
            times.append(time.perf_counter())
            loaded.append(load_adapter(directory, number))
            times.append(time.perf_counter())
            edits.load(slot, loaded[-1].stacks)
            times.append(time.perf_counter())
            for name, first, last in (
                ("front end", 0, 1),
                ("worker", 1, 2),
                ("slot", 2, 3),
                ("all", 0, 3),
            ):
                seconds.values.setdefault(name, []).append(times[last] - times[first])
    of_adapters = [
        tensor
        for adapter in loaded
        for stack in adapter.stacks.values()
        for tensor in stack
        if tensor is not None
    ]
    held = {
        "slots": _bytes(buffers.values()),
        "loaded adapters": _bytes(of_adapters),
        "process": _resident() - start,
    }
    values = {name: [float(found)] for name, found in held.items()}
    return Series({**setting.asdict(), "adapters": count}, values), seconds


def _bytes(tensors: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _resident() -> int:
    """Return this process's bytes in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
