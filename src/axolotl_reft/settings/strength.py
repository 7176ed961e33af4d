"""The strength of an adapter: α in h + α(Φ(h) − h)."""

from numbers import Real

import torch

from axolotl_reft.errors import shown

# Edits are computed in float32; this is also false for infinities and NaN.
_LARGEST = torch.finfo(torch.float32).max


def read_strength(value: object, setting: str) -> float:
    """Return a strength as a float; ``ValueError`` for what is not a finite number."""
    if isinstance(value, Real) and abs(float(value)) <= _LARGEST:
        return float(value)
    raise ValueError(
        f"{setting}: {shown(value)} is not a finite number; pass 1 for the adapter, 0 "
        "for the base, or another number such as 0.5"
    )
