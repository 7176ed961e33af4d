"""A pytest plugin that runs PEFT's generic tests with LoReFT's configs alone."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from axolotl_reft import LoreftConfig
from benchmarks.peft_suite.models import CustomModel
from benchmarks.peft_suite.replaced import REPLACED

PACKAGE = "peft_tests"  # The copy of PEFT's tests.


class Outcome(NamedTuple):
    """What became of a test, with the failure's or the skip's message."""

    test: str
    outcome: str
    message: str


class LoreftPlugin:
    """Replaces PEFT's lists of methods and notes the outcomes."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def pytest_sessionstart(self) -> None:
        # For the messages that the list of expected failures names.
        pytest.register_assert_rewrite(f"{PACKAGE}.testing_common")
        _import_shared_modules()

    def pytest_pycollect_makeitem(self, collector: Any, name: str) -> None:
        # Before the first test of a module is parametrised.
        _stand_in(collector.module)

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        lists = REPLACED[metafunc.module.__name__.removeprefix(f"{PACKAGE}.")]
        found = {id(getattr(metafunc.module, name)): name for name in lists}
        marks = metafunc.definition.own_markers
        for place, mark in enumerate(marks):
            if mark.name == "parametrize" and id(mark.args[1]) in found:
                rows = lists[found[id(mark.args[1])]]
                marks[place] = pytest.mark.parametrize(mark.args[0], rows).mark

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        others = [item for item in items if not _has_our_config(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _has_our_config(item)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        error: Any = report.longrepr
        if isinstance(error, tuple):  # File, line and reason of a skip.
            message = error[2]
        else:
            crash = getattr(error, "reprcrash", None)
            message = f"{crash.path}:{crash.lineno}: {crash.message}" if crash else ""
        test = report.nodeid.removeprefix(f"{PACKAGE}/")
        self.outcomes.append(Outcome(test, report.outcome, message))


def _has_our_config(item: Any) -> bool:
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(p is LoreftConfig or isinstance(p, LoreftConfig) for p in parameters)


def _import_shared_modules() -> None:
    """Import what the files share; nothing in it reaches for the hub."""
    utils: Any = importlib.import_module(f"{PACKAGE}.testing_utils")
    utils.hub_online_once = lambda model_id: nullcontext()
    # PEFT's methods begin as the identity unless told; LoReFT never does.
    utils.set_init_weights_false = lambda config_cls, kwargs: dict(kwargs)
    missing = importlib.util.find_spec("diffusers") is None
    if missing:  # A name of it is imported, for a test of image models.
        stub: Any = ModuleType("diffusers")
        stub.__spec__ = ModuleSpec("diffusers", None)
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = stub
    common: Any = importlib.import_module(f"{PACKAGE}.testing_common")
    if missing:
        del sys.modules["diffusers"]
    # What PEFT asks of its LoRA alone, such as adapters per row, is asked of LoReFT.
    common.LoraConfig = LoreftConfig


def _stand_in(module: Any) -> None:
    """Give a file's tests the names that they look up when they run."""
    if hasattr(module, "PEFT_DECODER_MODELS_TO_TEST"):
        module.LoraConfig = LoreftConfig  # As in the shared module.
        # Meant for one method, it skips Llama and gives GPT-J a setting, for all.
        module.check_beft_config = lambda *args: None
    if hasattr(module, "MockTransformerWrapper"):
        module.MockTransformerWrapper.from_pretrained = CustomModel.from_pretrained
        module.MLP = lambda bias=True: CustomModel.from_pretrained()
