"""What a user reads who has no pyreft, or the wrong one."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from axolotl_reft.core import pyreft as pyreft_install

COMMAND = "pip install --no-deps pyreft==0.1.0"


def test_the_right_one_is_found():
    pyreft_install.check_pyreft()


def test_missing(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(pyreft_install, "version", version)
    with pytest.raises(ValueError, match="it is not installed.*") as error:
        pyreft_install.check_pyreft()
    assert COMMAND in str(error.value)


def test_another_version(monkeypatch):
    monkeypatch.setattr(pyreft_install, "version", lambda name: "0.0.2")
    with pytest.raises(ValueError, match="version 0.0.2 is installed") as error:
        pyreft_install.check_pyreft()
    assert COMMAND in str(error.value)


def test_without_pyvene(monkeypatch):
    monkeypatch.setattr(pyreft_install, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs pyvene") as error:
        pyreft_install.check_pyreft()
    assert "pip install 'pyvene>=0.1.8,<0.2'" in str(error.value)


def test_one_that_cannot_be_imported():
    code = (
        "import sys; sys.modules['pyreft'] = None\n"
        "import axolotl_reft\n"
        "try:\n    import axolotl_reft.core.interventions\n"
        "except ValueError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "importing it failed" in done.stdout and COMMAND in done.stdout
