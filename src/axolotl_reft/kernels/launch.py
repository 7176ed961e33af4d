"""Launches of the kernels of ``edit.py``, in the place of torch's operations.

Shapes: as in ``core/stacked_edits.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton import next_power_of_2  # type: ignore[import-untyped]

from axolotl_reft.core.affine import AffineStack
from axolotl_reft.core.scatter import EditIndices
from axolotl_reft.core.stacked_edits import Affine, Workspace
from axolotl_reft.kernels import edit as kernels

# A kernel's registers hold this many products at once, and so few rows and ranks.
PRODUCTS = 8192
# Up to so many, each row gets a multiprocessor of its own.
_FEW_ROWS = 256
_SMALLEST_DOT = 16
# A kernel's grid, and its block sizes.
_Launch = tuple[tuple[int, ...], dict[str, int]]


class TritonWorkspace(Workspace):
    """Edits and differentiates by Triton's kernels: a copy and a launch for each layer
    and direction, and a launch for the parameters of all layers."""

    def __init__(self, stack: AffineStack, layers: int) -> None:
        super().__init__(stack, layers)
        self.kept_sources = self.rank  # a row's are of its side alone

    def open(self, h_BTD: Tensor, indices: EditIndices | None) -> None:
        assert indices is not None, "all rows are edited by torch's operations"
        super().open(h_BTD, indices)
        self.index_N = indices.all_N.contiguous()
        self.counts = self.rows[0], sum(self.rows[1:])
        self.sizes = {"D": self.width, "R": self.rank}
        self.blocks, self.launch_kwargs = by_rows(self.rows, self.width, self.rank)

    def add(
        self, x_SD: Tensor, taken_ND: Tensor | None, source_NC: Tensor, affine: Affine
    ) -> Tensor:
        x_SD, (m_CD, b_C, p_CD) = x_SD.contiguous(), affine
        out_SD = x_SD if p_CD is None else x_SD.clone()
        if any(self.rows):
            # In the place of None, a tensor that the kernel does not read.
            given = [x_SD if t is None else t for t in (taken_ND, m_CD, b_C, p_CD)]
            with torch.cuda.device_of(x_SD):  # else Triton takes the current one
                kernels.edit_rows[self.blocks](
                    x_SD, out_SD, source_NC, self.index_N, *given, *self.counts,
                    self.tokens, HAS_M=m_CD is not None, HAS_B=b_C is not None,
                    HAS_P=p_CD is not None, KEEP=taken_ND is not None,
                    **self.sizes, **self.launch_kwargs,
                )  # fmt: skip
        return out_SD

    def parameter_gradients(self) -> tuple[Tensor | None, ...]:
        (grads_LND, grad_sources_LNC), self._grads = self.grads(), None
        count, rank, width = self.layers * len(self.rows), self.rank, self.width
        grad_p = self.sources_LNC.new_empty(count, rank, width)
        grad_m = torch.empty_like(grad_p) if self.has_m else grad_p
        grad_b = self.sources_LNC.new_empty(count, rank)
        blocks, launch_kwargs = by_columns(self.rows, width, rank, self.layers)
        with torch.cuda.device_of(grad_p):
            kernels.edit_weights_backward[blocks](
                grads_LND, self.taken_LND, self.sources_LNC, grad_sources_LNC,
                grad_m, grad_b, grad_p, *self.counts, HAS_M=self.has_m,
                **self.sizes, **launch_kwargs,
            )  # fmt: skip
        return grad_m if self.has_m else None, grad_b, grad_p


def by_rows(rows: Sequence[int], width: int, rank: int) -> _Launch:
    """Return the launch of a kernel whose programs take all columns of a few rows."""
    several = 1 if sum(rows) <= _FEW_ROWS else 4
    padded = next_power_of_2(rank)
    block = min(PRODUCTS // (padded * several), next_power_of_2(width))
    blocks = sum(-(-count // several) for count in rows)
    return (blocks,), {"RP": padded, "ROWS": several, "BLOCK": block, "num_warps": 8}


def by_columns(rows: Sequence[int], width: int, rank: int, layers: int = 1) -> _Launch:
    """Return the launch of the kernel whose programs take all rows of some columns."""
    padded = max(next_power_of_2(rank), _SMALLEST_DOT)
    several = min(max(next_power_of_2(max(rows)), _SMALLEST_DOT), 512 // padded)
    blocks = (-(-width // 64), len(rows), layers)
    return blocks, {"RP": padded, "ROWS": several, "BLOCK": 64, "num_warps": 4}
