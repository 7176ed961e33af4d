"""Runs a benchmark of the suite: builds the contestants where each belongs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.base import Setting
from benchmarks.harness import Result, Series, hardware, now, take_turns, versions
from benchmarks.suite import Benchmark
from benchmarks.tasks import Bench
from benchmarks.worker import RemoteBench

# Contestants from environments of their own: the environment's directory, and whom
# they build there.
ELSEWHERE = {"pyreft-own": "pyreft", "adapters": "adapters"}


def run(
    name: str,
    benchmark: Benchmark,
    size: str,
    pythons: Mapping[str, str] | None = None,
    report: Callable[[str], None] = print,
    **changes: Any,
) -> Result:
    """Measure every setting of a size.

    Args:
        pythons: for contestants of ``ELSEWHERE``, the interpreter of the environment;
            those without are left out.
        changes: of the settings, such as ``device``.
    """
    settings = [setting.but(**changes) for setting in benchmark.sizes[size]]
    pythons = pythons or {}
    device = settings[0].device if settings else "cpu"
    fresh = benchmark.fresh and device == "cpu"
    remotes = {
        contestant: RemoteBench(pythons[contestant])
        for contestant in benchmark.contestants
        if contestant in pythons and not fresh
    }
    found = {"here": versions()}
    found |= {contestant: bench.versions() for contestant, bench in remotes.items()}
    here, series = Bench(), []
    repetitions = benchmark.repetitions[size]
    for setting in settings:
        if fresh:
            one = _in_fresh_processes(benchmark, setting, repetitions, pythons)
        else:
            one = _together(benchmark, setting, repetitions, here, remotes)
        report(f"{name} {_short(one)}")
        series.append(one)
    for bench in remotes.values():
        bench.close()
    return Result(
        benchmark=name,
        unit=benchmark.unit,
        floor=benchmark.contestants[0],
        series=series,
        versions=found,
        hardware=hardware(device),
        date=now(),
    )


def _takes_part(contestant: str, pythons: Mapping[str, Any]) -> bool:
    return contestant not in ELSEWHERE or contestant in pythons


def _together(
    benchmark: Benchmark,
    setting: Setting,
    repetitions: int,
    here: Bench,
    remotes: Mapping[str, RemoteBench],
) -> Series:
    one = Series(setting.asdict())
    turns: dict[str, Callable[[], float]] = {}
    for contestant in benchmark.contestants:
        if not _takes_part(contestant, remotes):
            continue
        built_as = ELSEWHERE.get(contestant, contestant)
        bench: Any = remotes.get(contestant, here)
        try:
            bench.build(benchmark.task, built_as, setting)
            bench.turn(built_as)
        except Exception as error:
            one.failures[contestant] = f"{type(error).__name__}: {error}"
        else:
            turns[contestant] = partial(bench.turn, built_as)
    one.values = take_turns(turns, repetitions, warm_up=0)
    return one


def _in_fresh_processes(
    benchmark: Benchmark,
    setting: Setting,
    repetitions: int,
    pythons: Mapping[str, str],
) -> Series:
    one = Series(setting.asdict())
    for _ in range(repetitions):
        for contestant in benchmark.contestants:
            if not _takes_part(contestant, pythons) or contestant in one.failures:
                continue
            python = pythons.get(contestant)
            bench = RemoteBench(python) if python else RemoteBench()
            built_as = ELSEWHERE.get(contestant, contestant)
            try:
                bench.build(benchmark.task, built_as, setting)
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
