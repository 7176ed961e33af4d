"""Edits of one forward, made ready for layers of equal shape together.

The parameters of such layers are stacked when a forward begins: one computation of all
rotations, and one of all parameters' gradients. Whatever cannot be used without calling
its module (a hook brings the parameters, as under FSDP2 and ZeRO-3), and edits with
dropout or a non-linear source, are made by the intervention itself.

Shapes: B batch, T tokens, L layers, I interventions of a layer, D hidden size, R rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from axolotl_reft.core.affine import (
    AffineStack,
    StackCache,
    affine_rows,
    affine_stack,
    other_side,
    projections,
)
from axolotl_reft.core.interventions import without_autocast
from axolotl_reft.core.scatter import EditIndices, edit, rows_at
from axolotl_reft.core.stacked_edits import StackedEdits
from axolotl_reft.kernels.dispatch import workspace_for
from axolotl_reft.tuner.context import ForwardContext, ModelState

# Above so many entries of edited rows, each layer computes its own gradients: the rows
# that all layers would keep cost more memory than the operations cost time.
_MOST_TOGETHER = 2**27


class LayerGroup:
    """Layers that one adapter edits by interventions of one kind, width and rank.

    Args:
        stack: of all their interventions, layer by layer.
        interventions: of each layer.
    """

    def __init__(
        self, stack: AffineStack, interventions: Sequence[Sequence[Any]]
    ) -> None:
        self._stack, self._interventions = stack, interventions
        self._layers = len(interventions)
        self._edits: StackedEdits | None = None
        self._parts: list[AffineStack] | None = None

    def edit(self, layer: int, h_BTD: Tensor, indices: EditIndices | None) -> Tensor:
        """Return a layer's hidden states, edited; once for each layer."""
        if is_compiling():
            return _edit_in_graph(self._part(layer), h_BTD, indices)
        if indices is not None:
            indices = indices.to(h_BTD.device)
        edited_BTD = self._edit(layer, h_BTD, indices)
        _tell_observers(self._interventions[layer], h_BTD, edited_BTD, indices)
        return edited_BTD

    def _edit(self, layer: int, h_BTD: Tensor, indices: EditIndices | None) -> Tensor:
        if self._edits is None and self._is_small(h_BTD, indices):
            self._edits = _stacked_edits(self._stack, self._layers, h_BTD, indices)
        if self._edits is not None and self._edits.fits(h_BTD):
            return self._edits.edit(layer, h_BTD, indices)
        single = _stacked_edits(self._part(layer), 1, h_BTD, indices)
        return single.edit(0, h_BTD, indices)

    def _is_small(self, h_BTD: Tensor, indices: EditIndices | None) -> bool:
        if indices is None:
            return self._layers == 1
        rows = sum(indices.sizes)
        return self._layers * rows * h_BTD.shape[-1] <= _MOST_TOGETHER

    def _part(self, layer: int) -> AffineStack:
        """Return the stack of one layer; autograd joins the gradients of all once."""
        if self._parts is None:
            size = len(self._stack.b_KR) // self._layers
            m_KRD = self._stack.m_KRD
            m = [None] * self._layers if m_KRD is None else m_KRD.split(size)
            parts = zip(
                m,
                self._stack.b_KR.split(size),
                self._stack.p_KRD.split(size),
                strict=True,
            )
            self._parts = [AffineStack(*part) for part in parts]
        return self._parts[layer]


def _stacked_edits(
    stack: AffineStack, layers: int, h_BTD: Tensor, indices: EditIndices | None
) -> StackedEdits:
    rank = stack.b_KR.shape[1]
    if indices is None:  # products of all rows, which torch's operations share out
        return StackedEdits(stack, layers)
    return StackedEdits(stack, layers, workspace_for(h_BTD.device, rank))


def _edit_in_graph(
    stack: AffineStack, h_BTD: Tensor, indices: EditIndices | None
) -> Tensor:
    """Edit by operations that a compiler sees."""

    def edit_rows(h_ND: Tensor) -> Tensor:
        sizes = [len(h_ND)] if indices is None else indices.sizes
        with without_autocast(h_ND.device):
            masked_NK = other_side(sizes, stack.b_KR.shape[1], h_ND.device)
            rows_ND = h_ND.float().reshape(-1, h_ND.shape[-1])
            new_ND = affine_rows(rows_ND, stack, masked_NK)
            return new_ND.view(h_ND.shape).to(h_ND.dtype)

    return edit_rows(h_BTD) if indices is None else edit(h_BTD, indices, [edit_rows])


def _tell_observers(
    interventions: Sequence[Any],
    h_BTD: Tensor,
    edited_BTD: Tensor,
    indices: EditIndices | None,
) -> None:
    """Call ``on_edit`` with the rows of each intervention before and after."""
    for side, intervention in enumerate(interventions):
        if intervention.on_edit is None:
            continue
        both = [h_BTD.detach(), edited_BTD.detach()]
        if indices is not None:
            where = indices.sides[side], indices.may_be_unused
            both = [rows_at(h.flatten(0, -2), *where) for h in both]
        intervention.on_edit(*both)


class EditPlan:
    """The edits of a forward, by layer and site, each to be taken once."""

    def __init__(self) -> None:
        self._ready: dict[Any, dict[str, Callable[..., Tensor]]] = defaultdict(dict)

    @classmethod
    def build(cls, state: ModelState, context: ForwardContext) -> EditPlan:
        """Group layers of equal shape and stack their parameters."""
        plan = cls()
        groups: dict[Any, list[Any]] = defaultdict(list)
        for layer in state.layers:
            for side, name, interventions in layer.outer_edits(context):
                key = _group_key(interventions)
                if key is not None and not _is_compiled_alone(layer):
                    groups[(name, *key)].append((layer, side, interventions))
        for key, members in groups.items():
            plan._add(key, members, state)
        return plan

    def _add(
        self,
        key: tuple[Any, ...],
        members: Sequence[tuple[Any, str, Sequence[Any]]],
        state: ModelState,
    ) -> None:
        by_layer = [interventions for *_, interventions in members]
        interventions = [one for layer in by_layer for one in layer]
        edits: list[Callable[..., Tensor]]
        if interventions[0].is_affine:
            cache = state.stacks.setdefault(key, StackCache())
            group = LayerGroup(cache.get(interventions), by_layer)
            edits = [partial(group.edit, number) for number in range(len(members))]
        elif torch.is_grad_enabled():
            p_RD = iter(projections(interventions).unbind(0))
            edits = [
                partial(
                    _edit_by_each, [partial(one.edit, p_RD=next(p_RD)) for one in layer]
                )
                for layer in by_layer
            ]
        else:  # each keeps its own P
            return
        for (layer, side, _), edit_layer in zip(members, edits, strict=True):
            self._ready[layer][f"{side} {key[0]}"] = edit_layer

    def take(self, layer: Any, side: str, name: str) -> Callable[..., Tensor] | None:
        """Return what edits hidden states (B, T, D) at indices; None the second time,
        and where nothing was made ready."""
        ready = self._ready.get(layer)
        return None if ready is None else ready.pop(f"{side} {name}", None)


def edit_hidden_states(
    h_BTD: Tensor, indices: EditIndices | None, interventions: Sequence[Any]
) -> Tensor:
    """Edit by a layer's own interventions, where nothing was made ready.

    Args:
        indices: the rows; None for all, by the one intervention.
    """
    builds = torch.is_grad_enabled() or is_compiling()  # else each keeps its own stack
    if builds and _group_key(interventions) and interventions[0].is_affine:
        group = LayerGroup(affine_stack(interventions), [interventions])
        return group.edit(0, h_BTD, indices)
    return _edit_by_each(interventions, h_BTD, indices)


def _edit_by_each(
    edits: Sequence[Callable[[Tensor], Tensor]],
    h_BTD: Tensor,
    indices: EditIndices | None,
) -> Tensor:
    """Edit by functions of the rows, one for each side."""
    if indices is None:
        return edits[0](h_BTD).to(h_BTD.dtype)
    return edit(h_BTD, indices, edits)


def _group_key(interventions: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return what stacked interventions have in common; None where their parameters
    must not be used without calling them."""
    if not all(one.has_local_params for one in interventions):
        return None
    if is_compiling() and any(one.on_edit is not None for one in interventions):
        return None
    first = interventions[0]
    # The shape of a parameter: a compiler takes numbers on modules for variables.
    matrix = next(iter(first._parameters.values()))
    shape = first.kind.name, tuple(matrix.shape), len(interventions)
    return *shape, matrix.device, first.is_affine


def _is_compiled_alone(layer: Any) -> bool:
    """Whether the layer's forward is a graph of its own, which makes its own edits."""
    return layer._compiled_call_impl is not None and not is_compiling()
