"""The axolotl plugin: the only part of the package that imports axolotl."""

from importlib.metadata import version
from typing import Any

from packaging.specifiers import SpecifierSet

AXOLOTL = ">=0.19,<0.20"


def __getattr__(name: str) -> Any:
    # On demand: axolotl imports this package for its commands whenever it starts.
    if name != "LoreftPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_axolotl()
    from axolotl_reft.plugin.plugin import LoreftPlugin

    return LoreftPlugin


def check_axolotl() -> None:
    """Refuse an axolotl that the plugin was not tested with.

    By a ValueError: of an ImportError, which changed modules would raise, axolotl logs
    a line and trains without the plugin.
    """
    found = version("axolotl")
    if found not in SpecifierSet(AXOLOTL, prereleases=True):
        raise ValueError(
            f"axolotl-reft works with axolotl{AXOLOTL}, and {found} is installed; "
            f"pip install 'axolotl{AXOLOTL}'"
        )
