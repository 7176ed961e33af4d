"""An edit by the kernels of kernels.py: a copy and a launch, two launches in backward.

Where they can run they take the place of editing.py's and interventions.py's
operations, which stay the reference and run everywhere else: without a GPU, compiled
(where torch makes its own kernels), at high ranks, with dropout or a nonlinear source,
and where a hook watches an intervention. ``AXOLOTL_REFT_KERNELS=0`` turns them off.

Shapes: B batch, T tokens, N edited rows, D hidden size, R rank.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from axolotl_reft.editing import rows_at

# A kernel's registers hold this many products at once, and so few rows and ranks.
_PRODUCTS = 8192
MOST_RANK = 32
# Up to so many, each row gets a multiprocessor of its own.
_FEW_ROWS = 256
_SMALLEST_DOT = 16


@cache
def _kernels() -> Any:
    """The kernels, or None where they are turned off or Triton cannot run them."""
    if os.environ.get("AXOLOTL_REFT_KERNELS") == "0" or find_spec("triton") is None:
        return None
    try:
        from axolotl_reft import kernels

        if torch.cuda.is_available():
            kernels.prepare()
    except Exception as error:
        warnings.warn(
            f"LoReFT: Triton cannot run its kernels here ({error}); torch's operations "
            "take their place, which compute the same and take longer where a batch "
            "has few tokens. With a C compiler installed Triton usually can; "
            "AXOLOTL_REFT_KERNELS=0 silences this",
            UserWarning,
            stacklevel=2,
        )
        return None
    return kernels


def _run_on(device: torch.device) -> bool:
    """Whether the kernels do: on NVIDIA's GPUs, and interpreted, as tests have it."""
    if device.type == "cuda":
        wanted = torch.version.cuda is not None
    else:
        wanted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return wanted and not torch.compiler.is_compiling() and _kernels() is not None


def can_edit(h_BTD: Tensor, interventions: Sequence[Any]) -> bool:
    """Whether :func:`edit` takes these."""
    device = h_BTD.device
    return _run_on(device) and all(
        one.affine
        and one.unwatched
        and one.rank <= MOST_RANK
        and one.bias.device == device  # a kernel would read what is not there
        for one in interventions
    )


def edit(
    h_BTD: Tensor, indices: Sequence[Tensor], interventions: Sequence[Any]
) -> Tensor:
    """What editing.py's ``edit`` returns, for one or two of interventions.py's, alike
    and of one rank, that :func:`can_edit` took."""
    one, indices = interventions[0], [index.to(h_BTD.device) for index in indices]
    edited_BTD: Tensor = _Edit.apply(
        h_BTD,
        one.has_weight,
        one.subtracts,
        *indices,
        *([one.weight.float() for one in interventions] if one.has_weight else ()),
        *[one.bias.float() for one in interventions],
        *[one.matrix_RD() for one in interventions],
    )
    for one, index_N in zip(interventions, indices, strict=True):
        if one.on_edit is not None:
            both = (h.detach().flatten(0, -2) for h in (h_BTD, edited_BTD))
            one.on_edit(*(rows_at(flat_SD, index_N) for flat_SD in both))
    return edited_BTD


class _Edit(torch.autograd.Function):
    """The hidden states with h + Pᵀ(Mh + b) at the rows of each side.

    What follows the first three arguments is, for each side: indices, then W where
    there is one, b, and P.
    """

    @staticmethod
    def forward(
        ctx: Any, h_BTD: Tensor, has_weight: bool, subtracts: bool, *rest: Tensor
    ) -> Tensor:
        rest = tuple(one.contiguous() for one in rest)
        index, weights, biases, matrices = _by_kind(rest, has_weight)
        rank, width = matrices[0].shape
        rows = [one.shape[0] for one in index]
        h_BTD = h_BTD.contiguous()
        out_BTD = h_BTD.clone()
        taken_ND = h_BTD.new_empty(sum(rows), width)
        sources_NR = matrices[0].new_empty(sum(rows), rank)
        sizes = {
            "D": width,
            "R": rank,
            "HAS_WEIGHT": has_weight,
            "SUBTRACT": subtracts,
        }
        counts = (rows[0], sum(rows[1:]), h_BTD.numel() // width)
        if any(rows):
            blocks, how = _by_rows(rows, width, rank)
            with _on(h_BTD.device):
                _kernels().edit_rows[blocks](
                    h_BTD, out_BTD, taken_ND, sources_NR, *_two(index), *_two(weights),
                    *_two(biases), *_two(matrices), *counts, **sizes, **how,
                )  # fmt: skip
        ctx.save_for_backward(taken_ND, sources_NR, *rest)
        ctx.rows, ctx.counts, ctx.sizes = rows, counts, sizes
        return out_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        taken_ND, sources_NR, *rest = ctx.saved_tensors
        rows, counts, sizes = ctx.rows, ctx.counts, ctx.sizes
        has_weight, rank, width = sizes["HAS_WEIGHT"], sizes["R"], sizes["D"]
        index, weights, _, matrices = _by_kind(rest, has_weight)
        passed_on = ctx.needs_input_grad[0]
        grad_BTD = grad_BTD.contiguous()
        out_BTD = grad_BTD.clone() if passed_on else grad_BTD
        grad_sources_NR = torch.empty_like(sources_NR)
        grad_P = matrices[0].new_empty(len(rows), rank, width)
        grad_W = torch.empty_like(grad_P) if has_weight else grad_P
        grad_b = matrices[0].new_empty(len(rows), rank)
        with _on(grad_BTD.device):
            if any(rows):
                blocks, how = _by_rows(rows, width, rank)
                _kernels().edit_rows_backward[blocks](
                    grad_BTD, out_BTD, grad_sources_NR, *_two(index), *_two(weights),
                    *_two(matrices), *counts, WRITE=passed_on, **sizes, **how,
                )  # fmt: skip
            blocks, how = _by_columns(rows, width, rank)
            _kernels().edit_weights_backward[blocks](
                grad_BTD, taken_ND, sources_NR, grad_sources_NR, *_two(index),
                grad_W, grad_b, grad_P, *counts, **sizes, **how,
            )  # fmt: skip
        return (
            out_BTD if passed_on else None,
            *[None] * (2 + len(rows)),
            *(grad_W.unbind(0) if has_weight else ()),
            *grad_b.unbind(0),
            *grad_P.unbind(0),
        )


def _by_kind(
    tensors: Sequence[Tensor], has_weight: bool
) -> tuple[Sequence[Tensor], ...]:
    """Indices, weights, biases and matrices; where there are no weights, the matrices
    in their place, which the kernels then do not read as such."""
    sides = len(tensors) // (4 if has_weight else 3)
    kinds = [tensors[start : start + sides] for start in range(0, len(tensors), sides)]
    if not has_weight:
        kinds.insert(1, kinds[-1])
    return tuple(kinds)


def _by_rows(
    rows: Sequence[int], width: int, rank: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """How many programs of a kernel take how many rows, and columns at once."""
    several = 1 if sum(rows) <= _FEW_ROWS else 4
    padded = _power_of_two(rank)
    block = min(_PRODUCTS // (padded * several), _power_of_two(width))
    blocks = sum(-(-count // several) for count in rows)
    return (blocks,), {"RP": padded, "ROWS": several, "BLOCK": block, "num_warps": 8}


def _by_columns(
    rows: Sequence[int], width: int, rank: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """The same, of the kernel whose programs take all rows of some columns."""
    padded = max(_power_of_two(rank), _SMALLEST_DOT)
    several = min(max(_power_of_two(max(rows)), _SMALLEST_DOT), 512 // padded)
    blocks = (-(-width // 64), len(rows))
    return blocks, {"RP": padded, "ROWS": several, "BLOCK": 64, "num_warps": 4}


def _two(sides: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A kernel's arguments for two sides; of one it never reads the second."""
    return sides[0], sides[-1]


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
