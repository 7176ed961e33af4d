"""Versions of the package and of the adapter format."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

# To be raised when an adapter holds what earlier packages would read wrongly.
FORMAT_VERSION = 1


class NewerFormatError(ValueError):
    """Raised for an adapter that a newer version of the package saved."""


@cache
def package_version() -> str:
    """Return the installed version; ``unknown`` where the package is not installed."""
    try:
        return version("axolotl-reft")
    except PackageNotFoundError:
        return "unknown"


def check_format(format_version: object, saved_by: object) -> None:
    """Check that an adapter of this format can be read.

    Args:
        format_version: from ``adapter_config.json``.
        saved_by: the package's version that saved it, for the message.

    Raises:
        NewerFormatError: it is newer than :data:`FORMAT_VERSION`.
        ValueError: it is no format number.
    """
    if type(format_version) is not int or format_version < 1:
        raise ValueError(
            f"format_version: {format_version!r} is not a whole number of at least 1; "
            "leave it out, it is written when an adapter is saved"
        )
    if format_version > FORMAT_VERSION:
        raise NewerFormatError(
            f"the adapter has format_version {format_version} (saved by axolotl-reft "
            f"{saved_by or 'of an unnamed version'}), and axolotl-reft "
            f"{package_version()} reads up to {FORMAT_VERSION}; upgrade axolotl-reft"
        )
