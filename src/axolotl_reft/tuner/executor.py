"""Edits of one forward, prepared for layers of equal shape together.

The parameters of such layers are stacked when a forward begins: one computation of all
rotations, and one of all parameters' gradients. An intervention edits by itself with
dropout, a non-linear source, or parameters that a hook gathers (FSDP2, ZeRO-3).

Shapes: B batch, T tokens, N edited rows, D hidden size, R rank, K interventions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from axolotl_reft.core import affine
from axolotl_reft.core.affine import AffineStack
from axolotl_reft.core.interventions import Intervention, without_autocast
from axolotl_reft.core.scatter import EditIndices, edit, rows_at
from axolotl_reft.core.stacked_edits import StackedEdits, Workspace
from axolotl_reft.kernels.dispatch import workspace_for
from axolotl_reft.tuner.context import Edit, ModelState

# Above so many entries of edited rows, each layer computes its own gradients: the rows
# that all layers would keep cost more memory than the operations cost time.
_MAX_TOGETHER = 2**27


def prepare_edits(state: ModelState) -> dict[tuple[nn.Module, str, str], Edit]:
    """Return the edits that layers of equal shape make together, by layer, site and
    adapter."""
    groups = defaultdict(list)
    for layer in state.layers:
        # A layer that is compiled alone is a graph of its own, which makes its edits.
        if layer._compiled_call_impl is not None and not is_compiling():
            continue
        for site, name, interventions in layer.outer_edits():
            key = _group_key(interventions)
            if key is not None:
                groups[(name, *key)].append(((layer, site, name), interventions))
    prepared: dict[tuple[nn.Module, str, str], Edit] = {}
    for key, members in groups.items():
        by_layer = [interventions for _, interventions in members]
        edits = _edits_of_group(state, key, by_layer)
        for (place, _), layer_edit in zip(members, edits, strict=False):
            prepared[place] = layer_edit
    return prepared


def _edits_of_group(
    state: ModelState, key: Hashable, by_layer: list[list[Intervention]]
) -> Sequence[Edit]:
    """Return each layer's edit; none where each intervention caches its own P."""
    interventions = [member for layer in by_layer for member in layer]
    if interventions[0].is_affine:
        stack = state.stacks.setdefault(key, affine.StackCache()).get(interventions)
        if is_compiling():
            parts = _split(stack, len(by_layer))
            return [partial(_edit_in_graph, part) for part in parts]
        group = LayerGroup(stack, by_layer)
        return [partial(group.edit, number) for number in range(len(by_layer))]
    if not torch.is_grad_enabled():
        return []
    p_RD = iter(affine.projections(interventions).unbind(0))
    by_side = [[partial(m.edit, p_RD=next(p_RD)) for m in layer] for layer in by_layer]
    return [partial(_edit_by_each, edits) for edits in by_side]


class LayerGroup:
    """Layers that one adapter edits, by the stack of their interventions of one kind,
    width and rank."""

    def __init__(
        self, stack: AffineStack, interventions: list[list[Intervention]]
    ) -> None:
        self._stack, self._interventions = stack, interventions
        self._edits: StackedEdits | None = None

    def edit(self, layer: int, h_BTD: Tensor, indices: EditIndices | None) -> Tensor:
        """Return a layer's hidden states, edited; once for each layer."""
        if indices is not None:
            indices = indices.to(h_BTD.device)
        edits, number = self._edits, layer
        if edits is None or not edits.fits(h_BTD):
            edits, number = self._begin(layer, h_BTD, indices)
        edited_BTD = edits.edit(number, h_BTD, indices)
        for side, intervention in enumerate(self._interventions[layer]):
            if intervention.on_edit is not None:
                both = [h_BTD.detach(), edited_BTD.detach()]
                if indices is not None:
                    where = indices.sides[side], indices.may_be_unused
                    both = [rows_at(h.flatten(0, -2), *where) for h in both]
                intervention.on_edit(*both)
        return edited_BTD

    def _begin(
        self, layer: int, h_BTD: Tensor, indices: EditIndices | None
    ) -> tuple[StackedEdits, int]:
        """Return the edits of all layers and the layer's number among them; of this one
        alone where rows are many, or unlike the first layer's."""
        layers = len(self._interventions)
        # All rows: torch's products use a device better than the kernels.
        workspace, together = Workspace, layers == 1
        if indices is not None:
            workspace = workspace_for(h_BTD.device, self._stack.b_KR.shape[1])
            entries = layers * sum(indices.sizes) * h_BTD.shape[-1]
            together = entries <= _MAX_TOGETHER
        if self._edits is None and together:
            self._edits = StackedEdits(self._stack, layers, workspace)
            return self._edits, layer
        return StackedEdits(self._parts[layer], 1, workspace), 0

    @cached_property
    def _parts(self) -> list[AffineStack]:
        """The stack of each layer; autograd joins the gradients of all once."""
        return _split(self._stack, len(self._interventions))


def _split(stack: AffineStack, layers: int) -> list[AffineStack]:
    size = len(stack.b_KR) // layers
    m_KRD = [None] * layers if stack.m_KRD is None else stack.m_KRD.split(size)
    parts = zip(m_KRD, stack.b_KR.split(size), stack.p_KRD.split(size), strict=True)
    return [AffineStack(*part) for part in parts]


def _edit_in_graph(
    stack: AffineStack, h_BTD: Tensor, indices: EditIndices | None
) -> Tensor:
    """Edit by operations that a compiler sees."""

    def edit_rows(h_ND: Tensor) -> Tensor:
        sizes = [len(h_ND)] if indices is None else indices.sizes
        with without_autocast(h_ND.device):
            masked_NC = affine.other_side(sizes, stack.b_KR.shape[1], h_ND.device)
            return affine.affine_rows(h_ND.float(), stack, masked_NC)

    if indices is not None:
        return edit(h_BTD, indices, [edit_rows])
    new_ND = edit_rows(h_BTD.reshape(-1, h_BTD.shape[-1]))
    return new_ND.view(h_BTD.shape).to(h_BTD.dtype)


def edit_hidden_states(
    h_BTD: Tensor, indices: EditIndices | None, interventions: list[Intervention]
) -> Tensor:
    """Edit by a layer's own interventions, where nothing was prepared."""
    builds = torch.is_grad_enabled() or is_compiling()  # else each keeps its own stack
    if builds and _group_key(interventions) and interventions[0].is_affine:
        stack = affine.affine_stack(interventions)
        if is_compiling():
            return _edit_in_graph(stack, h_BTD, indices)
        return LayerGroup(stack, [interventions]).edit(0, h_BTD, indices)
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


def _group_key(interventions: list[Intervention]) -> tuple[Hashable, ...] | None:
    """Return what stacked interventions have in common; None where their parameters
    must not be used without calling them."""
    for member in interventions:
        observed_in_graph = member.on_edit is not None and is_compiling()
        if observed_in_graph or not member.has_local_params:
            return None
    first = interventions[0]
    # Not the sizes on the module, which a compiler takes for variables.
    shapes = tuple(p.shape for p in first._parameters.values() if p is not None)
    kind, device = first.kind.name, first.bias.device
    return kind, shapes, len(interventions), device, first.is_affine
