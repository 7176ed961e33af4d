"""The plugin on releases of vLLM that it was not tested with."""

import logging
import multiprocessing
import sys
from importlib.metadata import entry_points
from types import ModuleType

import pytest

from axolotl_reft import serving

PATCHES = "axolotl_reft.serving.patches"


@pytest.fixture
def install(monkeypatch):
    """Put an empty module in the place of vLLM, which nothing can be changed of."""
    monkeypatch.delitem(sys.modules, PATCHES, raising=False)

    def put(version):
        module = ModuleType("vllm")
        module.__version__ = version
        monkeypatch.setitem(sys.modules, "vllm", module)
        return module

    return put


def test_vllm_finds_the_plugin_by_its_entry_point():
    (found,) = entry_points(group="vllm.general_plugins", name="loreft")
    assert found.load() is serving.register


@pytest.mark.parametrize(
    "version", ["0.31.9", "0.33.0", "0.33.0rc1", "0.33.0.dev7+g12ab", "1.0", "dev"]
)
def test_another_release_is_told_of_once_and_left_as_it_is(install, caplog, version):
    module = install(version)
    before = dict(vars(module))
    serving.register()
    assert vars(module) == before and PATCHES not in sys.modules
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name.startswith("vllm.")
    message = record.getMessage()
    assert f"vLLM {version}" in message and "nothing is changed" in message
    assert version == "dev" or serving.SUPPORTED in message


def test_processes_of_an_engine_do_not_repeat_it(install, caplog, monkeypatch):
    install("0.33.0")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    serving.register()
    assert caplog.records == []


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.1rc1", "0.32.0+cpu"])
def test_a_tested_release_without_what_is_changed_is_left_as_it_is(
    install, caplog, version
):
    module = install(version)
    before = dict(vars(module))
    serving.register()
    assert vars(module) == before
    assert "nothing is changed" in caplog.text and serving.SUPPORTED not in caplog.text
