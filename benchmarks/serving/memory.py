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
    loaded, with what the process grew by; and seconds to load each: checked by the
    front end, read by the worker, and put into a slot."""
    from peft import get_peft_model

    from axolotl_reft.serving.adapters import ServedBase, load_spec
    from axolotl_reft.serving.edited_rows import EditedRows
    from axolotl_reft.serving.layers import LayerEdits
    from axolotl_reft.serving.runner import LoadedAdapter

    width, layers, rank = setting.hidden_size, setting.layers, setting.rank
    served = ServedBase("", width, layers, rank)
    loaded, clock = [], time.perf_counter
    seconds: dict[str, list[float]] = {"front end": [], "worker": [], "slot": []}
    with TemporaryDirectory() as directory:
        adapted = get_peft_model(build_base(setting), our_config(setting))
        adapted.save_pretrained(directory)
        served.read(directory, "adapter")  # imports what is needed
        before = _resident()
        model = nn.Sequential(*(LlamaDecoderLayer() for _ in range(layers)))
        rows = EditedRows(_TOKENS, 2 * count, torch.device("cpu"))
        edits = LayerEdits(model, "LlamaDecoderLayer", layers, rows, count, rank, width)
        for slot in range(count):
            load_spec.cache_clear()
            start = clock()
            number = served.read(directory, "adapter").number
            checked = clock()
            loaded.append(LoadedAdapter.read(directory, number))
            read = clock()
            edits.load(slot, loaded[-1].stacks)
            times = checked - start, read - checked, clock() - read
            for name, value in zip(seconds, times, strict=True):
                seconds[name].append(value)
        grown = _resident() - before
    stacks = [stack for adapter in loaded for stack in adapter.stacks.values()]
    tensors = [tensor for stack in stacks for tensor in stack if tensor is not None]
    held = {
        "slots": {tensor.data_ptr(): tensor.nbytes for tensor in model.buffers()},
        "loaded adapters": {tensor.data_ptr(): tensor.nbytes for tensor in tensors},
    }
    values = {name: [float(sum(sizes.values()))] for name, sizes in held.items()}
    values["both, in the process"] = [float(grown)]
    return (
        Series(setting.asdict() | {"adapters": count}, values),
        Series(setting.asdict(), seconds),
    )


def _resident() -> int:
    """Return this process's bytes in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
