"""Imports pyreft, or says how to install it.

pyreft cannot be a declared dependency: its pins (transformers 4.45.1 and notebook
packages) contradict axolotl's, so it is installed with ``--no-deps``.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import StringIO
from types import ModuleType

PYREFT_VERSION = "0.1.0"
INSTALL_COMMAND = f"pip install --no-deps pyreft=={PYREFT_VERSION}"


def import_pyreft() -> ModuleType:
    """Import pyreft, or raise ValueError that says what to install."""
    try:
        if (found := version("pyreft")) != PYREFT_VERSION:
            raise _unusable(f"version {found} is installed")
    except PackageNotFoundError:
        raise _unusable("it is not installed") from None
    if find_spec("pyvene") is None:
        raise _unusable("pyvene, which it is built on, is not installed")
    try:
        # pyvene prints what it would like to have installed.
        with redirect_stdout(StringIO()):
            import pyreft
    except Exception as error:  # pyvene's imports can fail in their own ways
        raise _unusable(f"importing it failed: {error}") from error
    return pyreft


def _unusable(reason: str) -> ValueError:
    return ValueError(
        f"exchange with pyreft needs pyreft {PYREFT_VERSION}, and {reason}. Install it "
        "without its dependencies, whose pins contradict axolotl's, and pyvene:\n\n"
        f"    {INSTALL_COMMAND}\n    pip install 'pyvene>=0.1.8,<0.2'\n"
    )
