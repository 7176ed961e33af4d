"""The rotations of all edits of a forward as one computation.

A rotation is two dozen operations on few numbers (rotation.py), and a model has two a
layer. In a training step they are made for all layers at once, when the first layer is
to be edited, and lent to the interventions for their edits; on a GPU, of the layers
that fused.py leaves to operations. Torch only.

Shapes: D hidden size, R rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from axolotl_reft.core.rotation import rotations


def shared_rotations(interventions: Iterable[Any]) -> dict[Any, Tensor]:
    """The matrices of those interventions that have one, as rows (R, D): one
    computation for those of one shape on one device. Without those whose numbers a hook
    brings."""
    alike = defaultdict(list)
    for one in interventions:
        # Past nn.Module's getattr: there may be hundreds, in every step.
        vectors_DR = one._parameters.get("rotation")
        if vectors_DR is not None and one.unwatched:
            own = (one, vectors_DR, one._buffers["rotation_base"])
            alike[vectors_DR.shape, vectors_DR.device].append(own)
    found: dict[Any, Tensor] = {}
    for some in alike.values():
        owners, vectors, bases = zip(*some, strict=True)
        found |= dict(zip(owners, rotations(vectors, bases), strict=True))
    return found


@contextmanager
def lent(
    interventions: Sequence[Any], matrices: Mapping[Any, Tensor]
) -> Iterator[None]:
    """Within it, interventions have these matrices, and do not make their own."""
    # Past nn.Module's setattr, which takes longer than the edit's own arithmetic.
    for one in interventions:
        one.__dict__["lent_RD"] = matrices.get(one)
    try:
        yield
    finally:
        for one in interventions:
            one.__dict__["lent_RD"] = None
