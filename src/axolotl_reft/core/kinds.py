"""The six kinds of intervention: one row each, which every other table is made from.

Shapes: D width of the edited hidden state, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class InterventionKind:
    """Describes one kind of intervention: h + Pᵀ(f(Wh + b) − Ph), or part of it.

    Attributes:
        name: in the configuration.
        equation: with R for an orthonormal P, and W₂ for a free one.
        pyreft_class: name of pyreft's class.
        has_rotation: P is a rotation, held as ``rotation`` and ``rotation_base``;
            otherwise it is the free matrix ``proj_weight``.
        has_weight: the source reads the hidden state through ``weight``; otherwise it
            is ``bias`` alone.
        subtracts: Ph is subtracted from the source.
        takes_act_fn: pyreft's class applies an activation to the source.
        takes_dropout: pyreft's class applies dropout to the new hidden state.
    """

    name: str
    equation: str
    pyreft_class: str
    has_rotation: bool = True
    has_weight: bool = True
    subtracts: bool = False
    takes_act_fn: bool = True
    takes_dropout: bool = True

    def expected_shapes(self, width: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor in an intervention's state dict."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.has_rotation:
            shapes |= {"rotation": (width, rank), "rotation_base": (width, rank)}
        if self.has_weight:
            shapes["weight"] = (rank, width)
        shapes["bias"] = (rank,)
        if not self.has_rotation:
            shapes["proj_weight"] = (rank, width)
        return shapes

    def sizes(self, tensors: Mapping[str, Any]) -> tuple[int, int]:
        """Return D and R of an intervention's tensors; zeros where P is no matrix."""
        name = "rotation" if self.has_rotation else "proj_weight"
        shape = tensors[name].shape if name in tensors else ()
        if len(shape) != 2:
            return 0, 0
        return tuple(shape if self.has_rotation else reversed(shape))


KINDS = {
    kind.name: kind
    for kind in (
        InterventionKind(
            name="loreft",
            equation="h + Rᵀ(f(Wh + b) − Rh)",
            pyreft_class="LoreftIntervention",
            subtracts=True,
        ),
        InterventionKind(
            name="noreft",
            equation="h + W₂ᵀ(f(W₁h + b) − W₂h)",
            pyreft_class="NoreftIntervention",
            has_rotation=False,
            subtracts=True,
        ),
        # The paper's DiReFT; pyreft gives its name to the variant with a rotation.
        InterventionKind(
            name="direft",
            equation="h + W₂ᵀf(W₁h + b)",
            pyreft_class="NodireftIntervention",
            has_rotation=False,
        ),
        InterventionKind(
            name="orthogonal_direft",
            equation="h + Rᵀf(Wh + b)",
            pyreft_class="DireftIntervention",
        ),
        InterventionKind(
            name="consreft",
            equation="h + Rᵀ(b − Rh)",
            pyreft_class="ConsreftIntervention",
            has_weight=False,
            subtracts=True,
            takes_act_fn=False,
            takes_dropout=False,
        ),
        InterventionKind(
            name="lobireft",
            equation="h + Rᵀb",
            pyreft_class="LobireftIntervention",
            has_weight=False,
            takes_act_fn=False,
        ),
    )
}
