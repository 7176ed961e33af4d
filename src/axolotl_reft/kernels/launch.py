"""Launches of the kernels of ``edit.py``, in the place of torch's operations.

Shapes: S tokens, L layers, I interventions of a layer, N edited rows of a layer, D
hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from axolotl_reft.core.affine import AffineStack
from axolotl_reft.core.scatter import EditIndices
from axolotl_reft.core.stacked_edits import Workspace
from axolotl_reft.kernels import edit as kernels

# A kernel's registers hold this many products at once, and so few rows and ranks.
_PRODUCTS = 8192
# Up to so many, each row gets a multiprocessor of its own.
_FEW_ROWS = 256
_SMALLEST_DOT = 16


class TritonWorkspace(Workspace):
    """Edits and differentiates by Triton's kernels: a copy and a launch for each layer
    and direction, and a launch for the parameters of all layers."""

    def __init__(self, stack: AffineStack, layers: int) -> None:
        super().__init__(stack, layers)
        self.sizes = {
            "D": self.width,
            "R": self.rank,
            "HAS_M": stack.m_KRD is not None,
        }

    def open(self, h_BTD: Tensor, indices: EditIndices | None) -> None:
        assert indices is not None, "all rows are edited by torch's operations"
        super().open(h_BTD, indices)
        self.index = _two([index_N.contiguous() for index_N in indices.sides])
        self.counts = (self.rows[0], sum(self.rows[1:]), self.tokens)
        self.blocks, self.launch_kwargs = by_rows(self.rows, self.width, self.rank)

    def edit(self, h_SD: Tensor, layer: int) -> Tensor:
        place, h_SD = self.room(layer), h_SD.contiguous()
        out_SD = h_SD.clone()
        if any(self.rows):
            p_IRD = self.p_LIRD[layer]
            m_IRD = self.m_LIRD[layer]
            with on(h_SD.device):
                kernels.edit_rows[self.blocks](
                    h_SD, out_SD, self.taken_LND[place], self.sources_LNR[place],
                    *self.index, *_two(p_IRD if m_IRD is None else m_IRD),
                    *_two(self.b_LIR[layer]), *_two(p_IRD), *self.counts,
                    KEEP=self.keeps, **self.sizes, **self.launch_kwargs,
                )  # fmt: skip
        return out_SD

    def edit_backward(
        self, grad_SD: Tensor, layer: int, to_input: bool, to_parameters: bool
    ) -> Tensor | None:
        grad_SD = grad_SD.contiguous()
        out_SD = grad_SD.clone() if to_input else grad_SD
        grads_LND, grad_sources_LNR = self.grads()
        place, p_IRD, m_IRD = self.room(layer), self.p_LIRD[layer], self.m_LIRD[layer]
        if any(self.rows):
            with on(grad_SD.device):
                kernels.edit_rows_backward[self.blocks](
                    grad_SD, out_SD, grads_LND[place], grad_sources_LNR[place],
                    *self.index, *_two(p_IRD if m_IRD is None else m_IRD), *_two(p_IRD),
                    *self.counts, WRITE=to_input, KEEP=to_parameters,
                    **self.sizes, **self.launch_kwargs,
                )  # fmt: skip
        return out_SD if to_input else None

    def parameter_gradients(self) -> tuple[Tensor | None, Tensor, Tensor]:
        (grads_LND, grad_sources_LNR), self._grads = self.grads(), None
        sides = len(self.rows)
        grad_p = self.sources_LNR.new_empty(self.layers * sides, self.rank, self.width)
        grad_m = torch.empty_like(grad_p) if self.sizes["HAS_M"] else grad_p
        grad_b = self.sources_LNR.new_empty(self.layers * sides, self.rank)
        blocks, launch_kwargs = by_columns(
            self.rows, self.width, self.rank, self.layers
        )
        with on(grad_p.device):
            kernels.edit_weights_backward[blocks](
                grads_LND, self.taken_LND, self.sources_LNR, grad_sources_LNR,
                grad_m, grad_b, grad_p, *self.counts[:2], **self.sizes, **launch_kwargs,
            )  # fmt: skip
        return grad_m if self.sizes["HAS_M"] else None, grad_b, grad_p


def by_rows(
    rows: Sequence[int], width: int, rank: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Return the grid and the block sizes of a kernel that goes by rows."""
    several = 1 if sum(rows) <= _FEW_ROWS else 4
    padded = _power_of_two(rank)
    block = min(_PRODUCTS // (padded * several), _power_of_two(width))
    blocks = sum(-(-count // several) for count in rows)
    return (blocks,), {"RP": padded, "ROWS": several, "BLOCK": block, "num_warps": 8}


def by_columns(
    rows: Sequence[int], width: int, rank: int, layers: int = 1
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Return the same of the kernel whose programs take all rows of some columns."""
    padded = dot_size(rank)
    several = min(dot_size(max(rows)), 512 // padded)
    blocks = (-(-width // 64), len(rows), layers)
    return blocks, {"RP": padded, "ROWS": several, "BLOCK": 64, "num_warps": 4}


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launch on the device: Triton takes the current one, whatever its arguments'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _two(sides: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """A kernel's arguments for two sides; of one it never reads the second."""
    return sides[0], sides[-1]


def dot_size(number: int) -> int:
    """The next size that a kernel's products of matrices can have."""
    return max(_power_of_two(number), _SMALLEST_DOT)


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
