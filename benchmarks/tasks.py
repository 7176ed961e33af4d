"""What is measured of a contestant beside its training steps: functions that take one
turn and say its cost; and all tasks by name."""

from __future__ import annotations

import gc
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import shared_prompts
from benchmarks.base import Setting, build_base, clock, rectangle, share
from benchmarks.contestants import CONTESTANTS, our_config, ours
from benchmarks.steps import (
    compiled_step,
    logged_step,
    make_optimizer,
    preference_step,
    ragged,
    shared_prompt_step,
    steps_in_a_row,
    train,
    training_step,
)


def backward(name: str, base: nn.Module, setting: Setting) -> Callable[[], float]:
    """Seconds of backward alone, where axolotl has made the inputs require gradients.

    ``name`` is which layers are edited: all, the upper half, the last.
    """
    contestant = ours(share(base), setting.but(edited=name))
    contestant.model.enable_input_require_grads()  # type: ignore[operator]
    batch, now = contestant.collate(rectangle(setting)), clock(setting)

    def turn() -> float:
        loss = contestant.loss(batch)
        start = now()
        loss.backward()
        seconds = now() - start
        contestant.model.zero_grad()
        return seconds

    return turn


def _inference_model(name: str, base: nn.Module, setting: Setting) -> nn.Module:
    model = share(base)
    return (model if name == "base" else ours(model, setting).model).eval()


def prefill(name: str, base: nn.Module, setting: Setting) -> Callable[[], float]:
    """Seconds of one forward over the prompts, a cache filled."""
    model, now = _inference_model(name, base, setting), clock(setting)
    ids = rectangle(setting).inputs["input_ids"]

    @torch.no_grad()
    def turn() -> float:
        start = now()
        model(input_ids=ids, use_cache=True)
        return now() - start

    return turn


def decode(name: str, base: nn.Module, setting: Setting) -> Callable[[], float]:
    """Seconds of a token after the prompts, from four in a row.

    ``ours`` is the model that ``generate`` calls for each of them; ``by-peft`` has
    PEFT's own forward before it, as who calls the adapter's model token by token.
    """
    model: Any = _inference_model(name, base, setting)
    step, now = model.get_base_model() if name == "ours" else model, clock(setting)
    ids = rectangle(setting).inputs["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    @torch.no_grad()
    def turn() -> float:
        start = now()
        for _ in range(4):
            step(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        return (now() - start) / 4

    return turn


def generate(name: str, base: nn.Module, setting: Setting) -> Callable[[], float]:
    """Seconds of a token of ``generate``, prefill included, over 32 of them."""
    model: Any = _inference_model(name, base, setting)
    now = clock(setting)
    ids = rectangle(setting).inputs["input_ids"]
    asked = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}

    def turn() -> float:
        start = now()
        model.generate(input_ids=ids, pad_token_id=0, **asked)
        return (now() - start) / 32

    return turn


def trained(name: str, base: nn.Module, setting: Setting) -> Callable[[], float]:
    """How many parameters are trained."""
    count = sum(p.numel() for p in CONTESTANTS[name](share(base), setting).trained)
    return lambda: float(count)


def building(name: str, base: nn.Module, setting: Setting) -> Callable[[], float]:
    """Seconds to build the adapter on the base, everything imported."""
    from peft import get_peft_model

    config = our_config(setting)

    def turn() -> float:
        model: Any = share(base)
        start = time.perf_counter()
        get_peft_model(model, config)
        return time.perf_counter() - start

    return turn


def first_adapter(name: str, base: nn.Module, setting: Setting) -> Callable[[], float]:
    """Seconds of a process's first adapter: the import of what makes it, torch,
    transformers and PEFT aside, and its building."""
    import peft  # noqa: F401 - before the time

    if "axolotl_reft" in sys.modules:
        raise RuntimeError("axolotl_reft was imported before the time began")

    def turn() -> float:
        start = time.perf_counter()
        CONTESTANTS[name](base, setting)
        return time.perf_counter() - start

    return turn


def peak_memory(name: str, base: nn.Module, setting: Setting) -> Callable[[], float]:
    """Bytes that three training steps need beyond the base model, at their highest."""
    cuda = setting.device != "cpu"
    # Once at a tiny size, so that what libraries take is not counted.
    tiny = setting.but(hidden_size=64, layers=2, vocabulary=64)
    contestant = CONTESTANTS[name](build_base(tiny), tiny)
    train(contestant, make_optimizer(contestant), [contestant.collate(rectangle(tiny))])
    del contestant
    gc.collect()
    # Begins the high-water mark anew: building the base may have been higher.
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    contestant = CONTESTANTS[name](share(base), setting)
    batch = contestant.collate(rectangle(setting))
    train(contestant, make_optimizer(contestant), [batch] * 3)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    return lambda: float(peak - before)


def resident(which: str) -> int:
    """Bytes in memory now (VmRSS) or at most (VmHWM); a process inherits the other
    measure, ``ru_maxrss``, from the one that started it."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def launches(name: str, base: nn.Module, setting: Setting) -> Callable[[], float]:
    """What a training step launches on a GPU, once everything is compiled; elsewhere
    the operations it asks for, views left out."""
    contestant = CONTESTANTS[name](share(base), setting)
    batch, optimizer = (
        contestant.collate(rectangle(setting)),
        make_optimizer(contestant),
    )
    train(contestant, optimizer, [batch])

    def turn() -> float:
        if setting.device == "cpu":
            with Operations() as operations:
                train(contestant, optimizer, [batch])
            return float(len(operations.names))
        with torch.profiler.profile() as profile:
            train(contestant, optimizer, [batch])
            torch.cuda.synchronize()
        on_device = [e for e in profile.events() if e.device_type.name == "CUDA"]
        # Ranges of the host are shown on the device too.
        own = [e for e in on_device if not e.is_user_annotation]
        return float(len(own))

    return turn


def compiled_launches(
    name: str, base: nn.Module, setting: Setting
) -> Callable[[], float]:
    """How many kernels the code calls that torch.compile makes of a model's forward and
    backward."""
    from torch._inductor.utils import run_and_get_code

    contestant = CONTESTANTS[name](share(base), setting)
    contestant.model.compile(fullgraph=True)
    batch = contestant.collate(rectangle(setting))
    _, codes = run_and_get_code(lambda: contestant.loss(batch).backward())
    calls = [call for code in codes for call in _KERNEL_CALL.findall(code)]
    return lambda: float(len(calls))


# Those made for the graph, and torch's own.
_KERNEL_CALL = re.compile(
    r"^ +(?:\w+ = )?(?:cpp_fused_|triton_|extern_kernels\.|torch\.ops\.)[\w.]+\(",
    re.MULTILINE,
)


class Operations(TorchDispatchMode):
    """The names of what reaches a backend and is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names += [] if function.is_view else [str(function)]
        return function(*args, **kwargs or {})


TASKS: dict[str, Callable[[str, nn.Module, Setting], Callable[[], float]]] = {
    "training_step": training_step,
    "steps_in_a_row": steps_in_a_row,
    "compiled_step": compiled_step,
    "ragged": ragged,
    "logged_step": logged_step,
    "shared_prompt_step": shared_prompt_step,
    "preference_step": preference_step,
    "backward": backward,
    "prefill": prefill,
    "decode": decode,
    "generate": generate,
    "multiple_choice": shared_prompts.multiple_choice,
    "many_adapters": shared_prompts.many_adapters,
    "trained": trained,
    "building": building,
    "first_adapter": first_adapter,
    "peak_memory": peak_memory,
    "launches": launches,
    "compiled_launches": compiled_launches,
}


class Bench:
    """One process's contestants, on one base model that they share."""

    def __init__(self) -> None:
        self._setting: Setting | None = None
        self._base: nn.Module | None = None
        self._turns: dict[str, Callable[[], float]] = {}

    def build(self, task: str, name: str, setting: Setting) -> None:
        if setting != self._setting:
            self._turns.clear()
            self._base = None  # gone before the next one comes, in cycles too
            gc.collect()
            if setting.threads:
                torch.set_num_threads(setting.threads)
            self._base, self._setting = build_base(setting), setting
        assert self._base is not None
        self._turns[name] = TASKS[task](name, self._base, setting)

    def turn(self, name: str) -> float:
        return self._turns[name]()
