"""Whether the pyreft that our interventions extend is here, and how to get it.

pyreft cannot be a declared dependency: its pins (transformers 4.45.1 and notebook
packages) contradict axolotl's, so it is installed with ``--no-deps``.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

PYREFT_VERSION = "0.1.0"
INSTALL_COMMAND = f"pip install --no-deps pyreft=={PYREFT_VERSION}"


def pyreft_unusable(reason: str) -> ValueError:
    """The error of a missing or wrong pyreft: what is the matter, what to run."""
    return ValueError(
        f"LoReFT needs pyreft {PYREFT_VERSION}, and {reason}. Install it without its "
        f"dependencies, whose pins contradict axolotl's:\n\n    {INSTALL_COMMAND}\n"
    )


def check_pyreft() -> None:
    """Look for a usable pyreft without importing it (that costs seconds).

    Raises:
        ValueError: pyreft or pyvene is missing, or pyreft has another version.
    """
    try:
        found = version("pyreft")
    except PackageNotFoundError:
        raise pyreft_unusable("it is not installed") from None
    if found != PYREFT_VERSION:
        raise pyreft_unusable(f"version {found} is installed")
    if find_spec("pyvene") is None:
        raise ValueError(
            "LoReFT needs pyvene, which pyreft is built on, and it is not installed. "
            "Install it:\n\n    pip install 'pyvene>=0.1.8,<0.2'\n"
        )
