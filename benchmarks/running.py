"""Runs a benchmark of the suite: builds the contestants where each belongs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.base import Setting
from benchmarks.harness import Result, Series, hardware, now, take_turns, versions
from benchmarks.suite import Benchmark
from benchmarks.tasks import Bench
from benchmarks.worker import RemoteBench

# Contestants from environments of their own: the environment's directory, and whom
# they build there.
ELSEWHERE = {"pyreft-own": "pyreft", "adapters": "adapters"}
_BUILT_AS = ELSEWHERE | {"before": "ours"}

Workers = Mapping[str, Callable[[], RemoteBench]]


def workers(
    pythons: Mapping[str, str] | None = None, before: Path | None = None
) -> dict[str, Callable[[], RemoteBench]]:
    """Starts of the processes in which contestants run that do not run in this one.

    Args:
        pythons: for contestants of ``ELSEWHERE``, the interpreter of the environment.
        before: directory that holds another build of ``axolotl_reft``. ``ours`` gets a
            process as well then, so that the two differ in the build alone.
    """
    starts: dict[str, Callable[[], RemoteBench]] = {
        name: partial(RemoteBench, p) for name, p in (pythons or {}).items()
    }
    if before is not None:
        starts |= {"before": partial(RemoteBench, source=before), "ours": RemoteBench}
    return starts


def run(
    name: str,
    benchmark: Benchmark,
    size: str,
    elsewhere: Workers | None = None,
    report: Callable[[str], None] = print,
    **changes: Any,
) -> Result:
    """Measure every setting of a size.

    Args:
        elsewhere: by contestant, the start of its process (:func:`workers`); those of
            other environments or builds are left out without one.
        changes: of the settings, such as ``device``.
    """
    settings = [setting.but(**changes) for setting in benchmark.sizes[size]]
    elsewhere = elsewhere or {}
    device = settings[0].device if settings else "cpu"
    fresh = benchmark.fresh and device == "cpu"
    contestants = [
        contestant
        for contestant in benchmark.contestants
        if contestant not in _BUILT_AS or contestant in elsewhere
    ]
    remotes = {
        contestant: elsewhere[contestant]()
        for contestant in contestants
        if contestant in elsewhere and not fresh
    }
    found = {"here": versions()}
    found |= {contestant: bench.versions() for contestant, bench in remotes.items()}
    here, series = Bench(), []
    repetitions = benchmark.repetitions[size]
    for setting in settings:
        if fresh:
            one = _in_fresh_processes(
                benchmark.task, contestants, setting, repetitions, elsewhere
            )
        else:
            benches: dict[str, Any] = {c: remotes.get(c, here) for c in contestants}
            one = _together(benchmark.task, benches, setting, repetitions)
        report(f"{name} {_short(one)}")
        series.append(one)
    for bench in remotes.values():
        bench.close()
    return Result(
        benchmark=name,
        unit=benchmark.unit,
        floor=contestants[0],
        series=series,
        versions=found,
        hardware=hardware(device),
        date=now(),
    )


def _together(
    task: str, benches: Mapping[str, Any], setting: Setting, repetitions: int
) -> Series:
    one = Series(setting.asdict())
    turns: dict[str, Callable[[], float]] = {}
    for contestant, bench in benches.items():
        built_as = _BUILT_AS.get(contestant, contestant)
        try:
            bench.build(task, built_as, setting)
            bench.turn(built_as)
        except Exception as error:
            one.failures[contestant] = f"{type(error).__name__}: {error}"
        else:
            turns[contestant] = partial(bench.turn, built_as)
    one.values = take_turns(turns, repetitions, warm_up=0)
    return one


def _in_fresh_processes(
    task: str,
    contestants: list[str],
    setting: Setting,
    repetitions: int,
    elsewhere: Workers,
) -> Series:
    one = Series(setting.asdict())
    order, shuffle = list(contestants), random.Random(0).shuffle
    for _ in range(repetitions):
        shuffle(order)
        for contestant in order:
            if contestant in one.failures:
                continue
            bench = elsewhere.get(contestant, RemoteBench)()
            built_as = _BUILT_AS.get(contestant, contestant)
            try:
                bench.build(task, built_as, setting)
                one.values.setdefault(contestant, []).append(bench.turn(built_as))
            except RuntimeError as error:
                one.failures[contestant] = str(error)
            finally:
                bench.close()
    return one


def _short(one: Series) -> str:
    setting = one.setting
    shape = f"d={setting['hidden_size']} layers={setting['layers']}"
    values = ", ".join(
        f"{name} {min(found):.4g}" for name, found in one.values.items() if found
    )
    failures = "".join(f"; {name}: {why}" for name, why in one.failures.items())
    return f"{shape}: {values}{failures}"
