"""The subspace that each intervention of a saved adapter writes to.

Shapes: D hidden size, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_reft.core.rotation import rotation
from axolotl_reft.saved.directory import read_adapter_config, read_tensors

# Layer and side; side 1 is that of an untied suffix.
Place = tuple[int, int]


def projection(state: dict[str, Tensor]) -> Tensor:
    """Return Pᵀ (D, R) of an intervention's tensors: R transposed, or a free W₂."""
    if "rotation" in state:
        return rotation(state["rotation"].float(), state["rotation_base"])
    return state["proj_weight"].float().T


def orthogonality_error(p_DR: Tensor) -> float:
    """Return max |P Pᵀ − I|: 0 for orthonormal columns of ``p_DR``."""
    p_DR = p_DR.double()
    identity = torch.eye(p_DR.shape[1], dtype=p_DR.dtype)
    return float((p_DR.T @ p_DR - identity).abs().max())


def orthonormal_basis(p_DR: Tensor) -> Tensor:
    """Return an orthonormal basis (D, R) of the columns' span."""
    return torch.linalg.qr(p_DR).Q


def subspace_overlap(a_DR: Tensor, b_DR: Tensor) -> float:
    """Return the mean squared cosine of the angles between two subspaces.

    ‖AᵀB‖²/min(R_A, R_B) for orthonormal columns (Hu et al., arXiv 2106.09685, section
    7.2): 1 where one contains the other, 0 where they are orthogonal, about R/D by
    chance.
    """
    smaller = min(a_DR.shape[1], b_DR.shape[1])
    return float((a_DR.T @ b_DR).square().sum() / smaller)


def bases_to_compare(
    directory: str, size: int, layers: set[int]
) -> dict[Place, Tensor]:
    """Return the bases of another adapter, given by ``--with``.

    Args:
        size: hidden size of the adapter to compare with.
        layers: the layers that it edits.

    Raises:
        ValueError: it cannot be read, its hidden size differs, or no layer is shared.
    """
    read_adapter_config(directory, "--with")
    states = read_tensors(directory, "--with").interventions
    bases = {place: orthonormal_basis(projection(s)) for place, s in states.items()}
    found = next(iter(bases.values())).shape[0]
    if found != size:
        raise ValueError(
            f"--with: the adapter in {directory!r} edits vectors of size {found}, the "
            f"other one of {size}; compare adapters of one base model"
        )
    found_layers = {layer for layer, _ in bases}
    if not layers & found_layers:
        raise ValueError(
            f"--with: the adapter in {directory!r} edits layers "
            f"{sorted(found_layers)} and the other one {sorted(layers)}; there is no "
            "layer to compare"
        )
    return bases
