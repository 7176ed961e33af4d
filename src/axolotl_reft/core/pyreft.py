"""The error for a pyreft that the interventions cannot subclass."""

from __future__ import annotations


def pyreft_unusable(reason: str) -> ValueError:
    """Return an error that says what to install."""
    return ValueError(
        f"LoReFT needs pyreft 0.1.0, and {reason}. Install it without its "
        "dependencies, whose pins contradict axolotl's:\n\n"
        "    pip install --no-deps pyreft==0.1.0\n"
    )
