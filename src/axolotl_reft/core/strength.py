"""Edits at a strength: h + α(Φ(h) − h). Torch only.

Shapes: B batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A number, or one for each row, (B, 1, 1); None is 1.
Strength = float | Tensor | None


def at_strength(strength: Strength, unedited: Tensor, edited: Tensor) -> Tensor:
    """Return hidden states between, or beyond, the unedited and the edited ones.

    Exactly these at 0 and at 1, and where they are equal.
    """
    if strength is None:
        return edited
    dtype = torch.promote_types(edited.dtype, torch.float32)
    if isinstance(strength, Tensor):
        strength = strength.to(edited.device, dtype)
    between = torch.lerp(unedited.to(dtype), edited.to(dtype), strength)
    return between.to(edited.dtype)
