"""Rows of a step's hidden states that are edited, in buffers that stay where they are.

A captured graph replays its kernels and none of Python, so a step writes its rows where
the kernels look for them. The operation is one for eager, compiled and captured layers.

Shapes: T tokens of a step, N edited rows, E edits that are loaded (two sides for each
of the server's adapters at once), D hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from axolotl_reft.serving.edited_tokens import Places


class RowsOfEdit(NamedTuple):
    """Rows of a step that get an edit, ascending, and their strength or strengths."""

    edit: int
    rows: Places
    strength: float | NDArray[np.float64] = 1.0


class EditedRows:
    """The edited rows of a step, by the edit they get.

    Attributes:
        rows_T: N rows in the order of their edits, ascending within one.
        edits_T: their edits.
        starts_E1: where each edit's rows begin; the last is N.
        strengths_T1: their strengths; the last tells whether one is not 1.
    """

    def __init__(self, tokens: int, edits: int, device: torch.device) -> None:
        self.rows_T = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.edits_T = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.starts_E1 = torch.zeros(edits + 1, dtype=torch.int64, device=device)
        self.strengths_T1 = torch.ones(tokens + 1, device=device)
        self.strengths_T1[-1] = 0
        self._is_empty, self._is_at_full = True, True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.rows_T, self.edits_T, self.starts_E1, self.strengths_T1

    def set(self, found: Iterable[RowsOfEdit]) -> None:
        """Write the rows that each edit changes in the next step."""
        found = [of_edit for of_edit in found if of_edit.rows.size]
        if not found and self._is_empty:
            return
        self._is_empty = not found
        counts_E = np.zeros(self.starts_E1.shape[0] - 1, dtype=np.int64)
        for edit, rows, _ in found:
            counts_E[edit] += rows.size
        self.starts_E1[1:].copy_(torch.from_numpy(counts_E.cumsum()))
        if not found:
            return
        # The sort is stable: requests come in the order of their rows.
        found.sort(key=lambda of_edit: of_edit.edit)
        rows_N = np.concatenate([rows for _, rows, _ in found])
        edits_N = counts_E.nonzero()[0].repeat(counts_E[counts_E > 0])
        self.rows_T[: rows_N.size].copy_(torch.from_numpy(rows_N))
        self.edits_T[: rows_N.size].copy_(torch.from_numpy(edits_N))
        self._set_strengths(found)

    def _set_strengths(self, found: list[RowsOfEdit]) -> None:
        is_at_full = all(
            (s == 1).all() if isinstance(s, np.ndarray) else s == 1 for _, _, s in found
        )
        if is_at_full and self._is_at_full:
            return
        self._is_at_full = is_at_full
        self.strengths_T1.fill_(1)
        self.strengths_T1[-1] = not is_at_full
        if not is_at_full:
            of_rows = [np.broadcast_to(s, rows.shape) for _, rows, s in found]
            strengths_N = np.concatenate(of_rows)
            self.strengths_T1[: strengths_N.size].copy_(torch.from_numpy(strengths_N))


def edit_rows(
    hidden: Tensor,
    residual: Tensor | None,
    m_ERD: Tensor,
    b_ER: Tensor,
    p_ERD: Tensor,
    rows_T: Tensor,
    edits_T: Tensor,
    starts_E1: Tensor,
    strengths_T1: Tensor,
) -> None:
    """Replace x by x + αPᵀ(Mx + b) in the rows of :class:`EditedRows`, in place, where
    α is a row's strength.

    x is the sum of ``hidden`` and ``residual`` (T, D), in their dtype, which a layer
    leaves to the next one's norm: the edited sum takes the place of ``residual``, and
    zero that of ``hidden``. Without ``residual``, x is ``hidden``.
    """
    torch.ops.axolotl_reft.edit_rows(
        hidden, residual, m_ERD, b_ER, p_ERD, rows_T, edits_T, starts_E1, strengths_T1
    )


def _edit_by_operations(
    hidden: Tensor,
    residual: Tensor | None,
    m_ERD: Tensor,
    b_ER: Tensor,
    p_ERD: Tensor,
    rows_T: Tensor,
    edits_T: Tensor,
    starts_E1: Tensor,
    strengths_T1: Tensor,
) -> None:
    # This runs in every layer, and numbers cost less of numpy's views than of tensors.
    starts = starts_E1.numpy().item
    start, end = 0, starts(-1)
    if not end:
        return
    rows, edits = rows_T.numpy().item, edits_T.numpy().item
    has_strengths = strengths_T1.numpy().item(-1)
    hidden = hidden.view(-1, hidden.shape[-1])  # fails where that takes a copy
    written = hidden if residual is None else residual
    while start < end:
        edit = edits(start)
        stop = starts(edit + 1)
        rows_N, first, last = rows_T[start:stop], rows(start), rows(stop - 1)
        # Rows without a gap are a view, which is changed in place.
        place = slice(first, last + 1) if last - first == stop - start - 1 else None
        sums = written.index_select(0, rows_N) if place is None else written[place]
        if residual is not None:
            sums += hidden.index_select(0, rows_N) if place is None else hidden[place]
        x_ND = sums.float()
        source_NR = torch.addmm(b_ER[edit], x_ND, m_ERD[edit].T)
        if has_strengths:
            source_NR *= strengths_T1[start:stop, None]
        x_ND.addmm_(source_NR, p_ERD[edit])
        if place is None:
            written.index_copy_(0, rows_N, x_ND.to(written.dtype))
        else:
            sums.copy_(x_ND)
        if residual is not None and place is None:
            hidden.index_fill_(0, rows_N, 0)
        elif residual is not None:
            hidden[place].zero_()
        start = stop


def _edit_by_kernel(hidden: Tensor, residual: Tensor | None, *tensors: Tensor) -> None:
    from axolotl_reft.kernels.serving import launch_edit

    launch_edit(hidden.view(-1, hidden.shape[-1]), residual, *tensors)


# Not torch.library.custom_op, whose calls cost ten times as much.
_library = torch.library.Library("axolotl_reft", "DEF")
_library.define(
    "edit_rows(Tensor(a!) hidden, Tensor(b!)? residual, Tensor m, Tensor b, Tensor p, "
    "Tensor rows, Tensor edits, Tensor starts, Tensor strengths) -> ()"
)
_library.impl("edit_rows", _edit_by_operations, "CPU")
_library.impl("edit_rows", _edit_by_kernel, "CUDA")
_library.impl("edit_rows", lambda *tensors: None, "Meta")
