"""What a user reads who has no pyreft, or the wrong one."""

import sys
from importlib.metadata import PackageNotFoundError

import pyreft
import pytest
from conftest import build_adapter, build_model

from axolotl_reft import from_pyreft, to_pyreft
from axolotl_reft.exchange import objects as install
from axolotl_reft.exchange.directory import export_adapter
from axolotl_reft.exchange.live import import_adapter

COMMANDS = (
    "pip install --no-deps pyreft==0.1.0",
    "pip install 'pyvene>=0.1.8,<0.2'",
)


def missing(name):
    raise PackageNotFoundError(name)


def refused(call, reason):
    with pytest.raises(ValueError, match=reason) as error:
        call()
    assert all(command in str(error.value) for command in COMMANDS)


def test_the_right_one_is_found():
    assert install.import_pyreft() is pyreft


def test_missing(monkeypatch):
    monkeypatch.setattr(install, "version", missing)
    refused(install.import_pyreft, "needs pyreft 0.1.0, and it is not installed")


def test_another_version(monkeypatch):
    monkeypatch.setattr(install, "version", lambda name: "0.0.2")
    refused(install.import_pyreft, "version 0.0.2 is installed")


def test_without_pyvene(monkeypatch):
    monkeypatch.setattr(install, "find_spec", lambda name: None)
    refused(install.import_pyreft, "pyvene, which it is built on, is not installed")


def test_one_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyreft", None)
    refused(install.import_pyreft, "importing it failed")


def test_every_exchange_says_what_to_install(tmp_path, monkeypatch):
    model = build_adapter(build_model())
    model.save_pretrained(tmp_path / "a")
    export_adapter(str(tmp_path / "a"), str(tmp_path / "out"))
    monkeypatch.setattr(install, "version", missing)
    for call in (
        lambda: export_adapter(str(tmp_path / "a"), str(tmp_path / "b")),
        lambda: import_adapter(str(tmp_path / "out"), str(tmp_path / "b")),
        lambda: to_pyreft(model),
        lambda: from_pyreft(tmp_path / "out", build_model()),
    ):
        refused(call, "it is not installed")
    assert not (tmp_path / "b").exists()
