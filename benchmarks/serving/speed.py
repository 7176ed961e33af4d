"""Latency: prefill, decode steps, and the first token after a cached prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import Series, take_turns
from benchmarks.serving.engine import BLOCK, TARGETS, Engine, Times
from benchmarks.serving.models import adapters, base

MODES = {"eager": False, "compiled": True}

_Results = dict[str, Series]
# By contestant: the engine's targets, and the adapter.
CONTESTANTS: dict[str, tuple[str, str | None]] = {
    "base": ("LoReFT", None),
    "f7+l7": ("LoReFT", "f7+l7"),
    "l7": ("LoReFT", "l7"),
    "all": ("LoReFT", "all"),
    "base without adapters": ("no adapters", None),
    "base beside LoRA": ("LoReFT and LoRA", None),
    "f7+l7 beside LoRA": ("LoReFT and LoRA", "f7+l7"),
    "LoRA": ("LoReFT and LoRA", "LoRA"),
}
# Contestants that are compared: of one engine, or base requests of two.
PAIRS = (
    ("f7+l7", "base"),
    ("l7", "base"),
    ("all", "base"),
    ("base", "base without adapters"),
    ("f7+l7 beside LoRA", "base beside LoRA"),
    ("LoRA", "base beside LoRA"),
)
# By contestant: the adapters that a prompt is sent with, of which the last is timed.
PREFIX_CONTESTANTS: dict[str, tuple[str | None, ...]] = {
    "base": (None,),
    "l7": ("l7",),
    "base after base": (None, None),
    "l7 after base": (None, "l7"),
    "l7 after another l7": ("another l7", "l7"),
    "base after l7": ("l7", None),
}
PREFIX_PAIRS = (
    ("base after base", "base"),
    ("l7 after base", "l7"),
    ("l7 after another l7", "l7"),
    ("base after l7", "base"),
)


def speed(
    model: str, mode: str, sizes: dict[str, int], rounds: int, clock: str = "wall"
) -> _Results:
    """Return the series of a model and a mode, by benchmark.

    Args:
        sizes: the requests, as in ``__main__.py``.
    """
    import torch
    from transformers import AutoConfig

    directory = base(model)
    config = AutoConfig.from_pretrained(directory)
    setting: dict[str, Any] = {
        "model": model,
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "mode": mode,
        "clock": clock,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
    }
    of_steps = {name: sizes[name] for name in ("batch", "length", "steps")}
    of_prefix = {"batch": 1, "length": sizes["prefix"]}
    found = _latency(directory, setting | of_steps, rounds)
    found["serving-first-token"] = _first_token(directory, setting | of_prefix, rounds)
    return found


def _latency(base: Path, setting: dict[str, Any], rounds: int) -> _Results:
    """Seconds of a prefill and of a decode step."""
    found, given = adapters(base), _given(setting)
    engines = {name: Engine(base, name, found, **given) for name in TARGETS}

    def turn(name: str) -> Times:
        targets, adapter = CONTESTANTS[name]
        engine = engines[targets]
        prompts = engine.prompts(setting["batch"], setting["length"])
        return engine.turn(prompts, setting["steps"], adapter)

    times = take_turns(_turns(turn, CONTESTANTS), rounds)
    prefill = {name: [turn.prefill for turn in of] for name, of in times.items()}
    decode = {name: [turn.decode for turn in of] for name, of in times.items()}
    return {
        "serving-prefill": Series(setting, prefill),
        "serving-decode": Series(setting, decode),
    }


def _first_token(base: Path, setting: dict[str, Any], rounds: int) -> Series:
    """Seconds until the first token, with and without a cached prefix; the setting
    gets how many tokens were cached."""
    given = _given(setting) | {"prefix_caching": True}
    engine = Engine(base, "LoReFT", adapters(base), **given)

    def turn(name: str) -> Times:
        prompts = engine.prompts(1, setting["length"])
        for adapter in PREFIX_CONTESTANTS[name]:
            times = engine.turn(prompts, 0, adapter)
        return times

    times = take_turns(_turns(turn, PREFIX_CONTESTANTS), rounds)
    cached = {name: min(turn.cached for turn in of) for name, of in times.items()}
    values = {name: [turn.prefill for turn in of] for name, of in times.items()}
    return Series(setting | {"block_size": BLOCK, "cached": cached}, values)


def _given(setting: dict[str, Any]) -> dict[str, Any]:
    return {"compiled": MODES[setting["mode"]], "clock": setting["clock"]}


def _turns(
    turn: Callable[[str], Times], names: Iterable[str]
) -> dict[str, Callable[[], Times]]:
    return {name: partial(turn, name) for name in names}
