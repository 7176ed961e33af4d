"""How much memory what is kept may take."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import build_adapter, build_model

import axolotl_reft
from axolotl_reft.training import frozen_prompt
from axolotl_reft.tuner.model import hooks_of

HOST = torch.device("cpu")
GB = 10**9
FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """``machine(free, version, **groups)``: a host with control groups, each of them
    within the one before, with a limit, what is used and idle pages of files."""

    def make(free, version=2, **groups):
        memory = SimpleNamespace(available=free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        directory = tmp_path / "groups" / ("memory" if version == 1 else "")
        for name, (limit, used, idle) in groups.items():
            directory = directory / name
            directory.mkdir(parents=True)
            largest, current, inactive = FILES[version]
            (directory / largest).write_text(f"{limit}\n")
            (directory / current).write_text(f"{used}\n")
            (directory / "memory.stat").write_text(f"anon 7\n{inactive} {idle}\n")
        line = "4:memory:/" if version == 1 else "0::/"
        own = tmp_path / "cgroup"
        own.write_text(f"9:name=systemd:/x\n{line}{'/'.join(groups)}\n")
        monkeypatch.setattr(frozen_prompt, "_GROUPS", own)
        monkeypatch.setattr(frozen_prompt, "_CGROUP", tmp_path / "groups")

    return make


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_that_of_the_host_and_of_each_group(machine, version):
    machine(100 * GB, version)
    assert frozen_prompt.free_memory(HOST) == 100 * GB
    machine(100 * GB, version, job=(50 * GB, 20 * GB, 5 * GB))
    assert frozen_prompt.free_memory(HOST) == 35 * GB
    top, step = (40 * GB, 30 * GB, 0), ("max" if version == 2 else 2**62, 9, 0)
    machine(100 * GB, version, slurm=top, step=step)
    assert frozen_prompt.free_memory(HOST) == 10 * GB


def limit_of(cache, told=None):
    model = build_adapter(build_model(), positions="l3")
    tell = (told if told is not None else []).append
    axolotl_reft.use_frozen_prompt(model, True, cache, tell)
    return hooks_of(model.get_base_model()).frozen_prompt.kept.limit


def test_by_default_it_is_a_quarter_divided_among_processes(machine, monkeypatch):
    machine(100 * GB)
    assert limit_of(None) == 25 * GB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert limit_of(None) == 6.25 * GB


def test_more_than_is_free_is_not_used_and_said(machine, monkeypatch):
    machine(10 * GB)
    told = []
    assert limit_of("7GB", told) == 7 * GB and not told
    assert limit_of("100GB", told) == 8 * GB
    assert told == ["frozen_prompt_cache: lowered to 8 GB, 80% of what is free"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert limit_of("7GB") == 2 * GB


def test_zero_keeps_nothing():
    assert limit_of(0) == limit_of("0GB") == 0
