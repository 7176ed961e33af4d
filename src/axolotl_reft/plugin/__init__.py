"""The axolotl plugin: the only part of the package that imports axolotl."""

from axolotl_reft.plugin.plugin import LoreftPlugin

__all__ = ["LoreftPlugin"]
