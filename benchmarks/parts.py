"""Benchmarks of parts, without a model that computes: one intervention, the adapter's
size and time to build, imports."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.base import Setting, build_base
from benchmarks.contestants import our_config
from benchmarks.harness import Result, Series, hardware, now, take_turns, versions
from benchmarks.tasks import Bench
from benchmarks.worker import RemoteBench

# Of Llama-3's 8B and 70B, as far as an adapter sees them, on bases without memory.
SHAPES = {
    "8B": Setting(hidden_size=4096, layers=32, vocabulary=128256, device="meta"),
    "70B": Setting(hidden_size=8192, layers=80, vocabulary=128256, device="meta"),
}


def _result(benchmark: str, unit: str, floor: str, series: list[Series]) -> Result:
    return Result(
        benchmark, unit, floor, series, {"here": versions()}, hardware(), now()
    )


def intervention(size: str) -> Result:
    """Seconds of one LoReFT intervention, forward and backward, at 56 positions."""
    import pyreft

    from axolotl_reft.core.interventions import LoreftIntervention

    positions = 56
    series = []
    for d in {"toy": (64,), "quick": (1024, 4096)}.get(size, (512, 1024, 2048, 4096)):
        setting = Setting(hidden_size=d, layers=1, rank=min(8, d))
        torch.set_num_threads(setting.threads)
        hidden = torch.randn(positions, d)
        arguments: dict[str, Any] = {"embed_dim": d, "low_rank_dimension": setting.rank}
        turns = {
            "pyreft": _gradient(
                pyreft.LoreftIntervention(**arguments, dtype=torch.float32), hidden
            ),
            "ours": _gradient(LoreftIntervention(**arguments), hidden),
        }
        repetitions = {"toy": 2, "quick": 5}.get(size, 15)
        values = take_turns(turns, repetitions)
        series.append(Series(setting.asdict() | {"positions": positions}, values))
    return _result("intervention", "s", "pyreft", series)


def _gradient(module: torch.nn.Module, hidden: torch.Tensor) -> Callable[[], float]:
    def turn() -> float:
        rows = hidden.clone().requires_grad_()
        # Dense, as a layer above gives it; a sum's is one number, expanded.
        gradient = torch.ones_like(rows)
        start = time.perf_counter()
        module(rows).backward(gradient)
        return time.perf_counter() - start

    return turn


def build(size: str, before: Path | None = None) -> Result:
    """Seconds to build the adapter for a base that has no memory, and pyreft's
    interventions for the same; or that of another build, at ``before``."""
    import pyreft

    benches: dict[str, Any] = {"ours": Bench()}
    if before is not None:
        benches = {"before": RemoteBench(source=before), "ours": RemoteBench()}
    series = []
    for setting in _shapes(size):
        sides = 2 * setting.layers
        turns: dict[str, Callable[[], float]] = {}
        for name, bench in benches.items():
            bench.build("building", "ours", setting)
            turns[name] = partial(bench.turn, "ours")

        def theirs(setting: Setting = setting, sides: int = sides) -> float:
            start = time.perf_counter()
            for _ in range(sides):
                pyreft.LoreftIntervention(
                    embed_dim=setting.hidden_size, low_rank_dimension=setting.rank
                )
            return time.perf_counter() - start

        # pyreft's 70B takes half an hour and is not needed to see the difference.
        if size != "quick" and setting.hidden_size <= 4096 and before is None:
            turns["pyreft"] = theirs
        repetitions = 1 if "pyreft" in turns else 3 if before is None else 15
        series.append(Series(setting.asdict(), take_turns(turns, repetitions, 0)))
    if before is not None:
        for bench in benches.values():
            bench.close()
    return _result("build", "s", next(iter(benches)), series)


def adapter_bytes(size: str) -> Result:
    """Bytes of the adapter in memory and in its file, and of pyreft's."""
    import pyreft
    from peft import get_peft_model

    series = []
    for setting in _shapes(size):
        model = get_peft_model(build_base(setting), our_config(setting))
        own = [t for n, t in model.state_dict().items() if ".intv_" in n]
        theirs = pyreft.LoreftIntervention(
            embed_dim=setting.hidden_size, low_rank_dimension=setting.rank
        )
        count = 2 * setting.layers
        held = [*theirs.parameters(), *theirs.buffers()]
        with TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            file = Path(directory) / "adapter_model.safetensors"
            on_disk = file.stat().st_size
            torch.save(theirs.state_dict(), Path(directory) / "theirs.bin")
            their_file = (Path(directory) / "theirs.bin").stat().st_size * count
        values = {
            "ours": [float(_bytes(own))],
            "pyreft": [float(_bytes(held) * count)],
            "ours, on disk": [float(on_disk)],
            "pyreft, on disk": [float(their_file)],
        }
        series.append(Series(setting.asdict(), values))
    return _result("adapter-bytes", "B", "ours", series)


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _shapes(size: str) -> list[Setting]:
    if size == "toy":
        return [Setting(hidden_size=64, layers=2, rank=2, vocabulary=64, device="meta")]
    return list(SHAPES.values())


_IMPORTS = {
    "peft": "import peft, transformers",
    "axolotl_reft": "import peft, transformers, axolotl_reft",
    "interventions": "import peft, transformers, axolotl_reft.core.interventions",
    "axolotl": "import axolotl.loaders.model",
    "plugin": "import axolotl.loaders.model, axolotl_reft.plugin.plugin",
}


def start_up(size: str) -> Result:
    """Seconds a fresh Python takes to import what the plugin is beside, and it."""
    names = list(_IMPORTS)
    if size == "toy":
        names = ["peft", "axolotl_reft"]
    elif find_spec("axolotl") is None:
        names = names[:3]
    turns = {name: _import(_IMPORTS[name]) for name in names}
    repetitions = {"toy": 1, "quick": 3}.get(size, 9)
    values = take_turns(turns, repetitions, 0 if size == "toy" else 1)
    return _result("start-up", "s", "peft", [Series({}, values)])


def _import(code: str) -> Callable[[], float]:
    def turn() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        return time.perf_counter() - start

    return turn


PARTS: dict[str, Callable[[str], Result]] = {
    "intervention": intervention,
    "build": build,
    "adapter-bytes": adapter_bytes,
    "start-up": start_up,
}
