"""The six kinds of intervention; each has a class in ``interventions.py`` too.

Shapes: D width of the edited hidden state, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class InterventionKind:
    """One kind of intervention: h + Pᵀ(f(Wh + b) − Ph), or part of it."""

    name: str  # in the configuration
    pyreft_class: str
    # P is ``rotation`` on ``rotation_base``; else the free matrix ``proj_weight``.
    has_rotation: bool = True
    has_weight: bool = True  # Wh is in it, and with it the activation f
    subtracts: bool = False  # Ph is in it
    takes_dropout: bool = True  # pyreft's class does, of the new hidden state

    def expected_shapes(self, width: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor in an intervention's state dict."""
        shapes: dict[str, tuple[int, ...]] = {"bias": (rank,)}
        if self.has_weight:
            shapes["weight"] = (rank, width)
        if self.has_rotation:
            return shapes | dict.fromkeys(("rotation", "rotation_base"), (width, rank))
        return shapes | {"proj_weight": (rank, width)}

    def sizes(self, tensors: Mapping[str, Any]) -> tuple[int, int]:
        """Return D and R of an intervention's tensors; zeros where P is no matrix."""
        name = "rotation" if self.has_rotation else "proj_weight"
        shape = tensors[name].shape if name in tensors else ()
        if len(shape) != 2:
            return 0, 0
        return tuple(shape if self.has_rotation else reversed(shape))


_ROWS = (
    InterventionKind("loreft", "LoreftIntervention", subtracts=True),
    InterventionKind(
        "noreft", "NoreftIntervention", has_rotation=False, subtracts=True
    ),
    # The paper's DiReFT; pyreft gives its name to the variant with a rotation.
    InterventionKind("direft", "NodireftIntervention", has_rotation=False),
    InterventionKind("orthogonal_direft", "DireftIntervention"),
    InterventionKind(
        "consreft",
        "ConsreftIntervention",
        has_weight=False,
        subtracts=True,
        takes_dropout=False,
    ),
    InterventionKind("lobireft", "LobireftIntervention", has_weight=False),
)
KINDS = {kind.name: kind for kind in _ROWS}
