"""The axolotl plugin: the only part of the package that imports axolotl."""

from typing import Any


def __getattr__(name: str) -> Any:
    # On demand: axolotl imports this package for its commands whenever it starts.
    if name != "LoreftPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from axolotl_reft.plugin.version import check_axolotl

    check_axolotl()
    from axolotl_reft.plugin.plugin import LoreftPlugin

    return LoreftPlugin
