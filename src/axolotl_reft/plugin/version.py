"""Check axolotl's version before any of its modules is imported."""

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

AXOLOTL = ">=0.19,<0.20"


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
