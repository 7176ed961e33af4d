"""Edits by the kernels of kernels.py, as functions of autograd's.

Forward and backward, a layer is a copy and a launch. The gradients of all layers'
numbers are one launch, once backward has been through the layers: each has a token for
an input that a function of the numbers made, which autograd therefore calls last. What
the layers keep for it is in a place of their own and not saved with autograd, for which
it would be tensors of each.

Shapes: B batch, T tokens, N edited rows of all sides, L layers, D hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from axolotl_reft.core import scatter as editing

# A kernel's registers hold this many products at once, and so few rows and ranks.
_PRODUCTS = 8192
# Up to so many, each row gets a multiprocessor of its own.
_FEW_ROWS = 256
_SMALLEST_DOT = 16

# What rotation.py's ``rotate`` keeps, what makes gradients of it, and fused.py's.
Kept = Sequence[Tensor]
Backward = Callable[[Kept, Tensor], Tensor]
Rotate = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Kept, Backward]]


class Edits:
    """The edits of one or several layers' hidden states in one forward.

    Of numbers at first, which are known before there are hidden states, and of these
    from :meth:`at` on.

    Args:
        kernels: the module kernels.py.
        interventions: for each layer, one of interventions.py's for each of one or two
            sides; all alike, and of one rank.
        rotate: what makes the rotations of all of them in a forward with gradients, as
            rotation.py's ``rotate``, with the function that takes what that kept and
            gradients of the matrices; without it each gives its own.
    """

    def __init__(
        self,
        kernels: Any,
        interventions: Sequence[Sequence[Any]],
        rotate: Rotate | None = None,
    ) -> None:
        self._interventions = interventions
        everyone = [one for layer in interventions for one in layer]
        first = everyone[0]
        # Past nn.Module's getattr: there may be hundreds, in every step.
        parameters = [one._parameters for one in everyone]
        biases = _as_read([own["bias"] for own in parameters])
        numbers = [biases]
        if first.has_weight:
            numbers.insert(0, _as_read([own["weight"] for own in parameters]))
        matrices: Sequence[Tensor]
        through: tuple[Kept, Backward] | None = None
        if rotate and torch.is_grad_enabled() and "rotation" in parameters[0]:
            vectors = _as_read([own["rotation"] for own in parameters])
            bases = [one._buffers["rotation_base"] for one in everyone]
            with torch.no_grad():
                matrices_KRD, kept, backward = rotate(vectors, bases)
            through = kept, backward
            matrices = matrices_KRD.unbind(0)
            numbers.append(vectors)
        else:
            matrices = _as_read([one.matrix_RD() for one in everyone])
            numbers.append(matrices)
        flat = [number for kind in numbers for number in kind]
        keeps = torch.is_grad_enabled() and any(one.requires_grad for one in flat)
        self._room = _Room(kernels, first, len(interventions), keeps)
        self._token = _Numbers.apply(self._room, through, *flat)
        # Where there is no W, the kernels do not read what stands in its place.
        sides, kinds = len(interventions[0]), (numbers[0], biases, matrices)
        self._numbers = [
            [_two(kind[start : start + sides]) for kind in kinds]
            for start in range(0, len(everyone), sides)
        ]

    def at(self, h_BTD: Tensor, indices: Sequence[Tensor]) -> Edits:
        """These, of hidden states like some; once.

        Args:
            indices: for each side, as editing.py's ``edit`` has them; the layers'.
        """
        self._like = _kind(h_BTD)
        self._index = [one.to(h_BTD.device).contiguous() for one in indices]
        self._room.open(h_BTD, self._index)
        return self

    def edit(self, layer: int, h_BTD: Tensor) -> Tensor:
        """A layer's hidden states, edited; once a layer.

        Args:
            layer: which of the interventions'.
        """
        interventions = self._interventions[layer]
        if _kind(h_BTD) != self._like:
            return editing.edit(h_BTD, self._index, interventions)
        edited_BTD: Tensor = _Edit.apply(
            h_BTD, self._token, self._room, layer, self._numbers[layer]
        )
        for one, index_N in zip(interventions, self._index, strict=True):
            if one.on_edit is not None:
                both = (h.detach().flatten(0, -2) for h in (h_BTD, edited_BTD))
                one.on_edit(*(editing.rows_at(flat_SD, index_N) for flat_SD in both))
        return edited_BTD


class _Room:
    """What the layers' kernels share, and where they leave what backward needs.

    Attributes:
        index: indices of the two sides.
        counts: rows of each side, and tokens.
        blocks, how: of a launch by rows.
        keeps: whether the numbers' gradients will be asked for.
        sources: for each layer, Mh + b (N, R).
        taken: for each layer, the rows as they were (N, D).
    """

    def __init__(
        self, kernels: Any, intervention: Any, layers: int, keeps: bool
    ) -> None:
        self.kernels, self.keeps, self._layers = kernels, keeps, layers
        self.sizes = {
            "D": intervention.hidden_size,
            "R": intervention.rank,
            "HAS_WEIGHT": intervention.has_weight,
            "SUBTRACT": intervention.subtracts,
        }
        self._backward = -1
        self._grads: tuple[Tensor, Tensor] | None = None
        self._grads_by_layer: list[tuple[Tensor, Tensor]] = []

    def open(self, h_BTD: Tensor, index: Sequence[Tensor]) -> None:
        """Make the place, now that it is known what is edited."""
        width, rank, layers = self.sizes["D"], self.sizes["R"], self._layers
        self.index, self.rows = _two(index), [one.shape[0] for one in index]
        self.counts = (self.rows[0], sum(self.rows[1:]), h_BTD.numel() // width)
        self.blocks, self.how = by_rows(self.rows, width, rank)
        rows = sum(self.rows)
        # Zeros where a forward or a backward may leave some of the layers out.
        blank = torch.zeros if layers > 1 else torch.empty
        self._blank = partial(blank, device=h_BTD.device)
        # Where nothing is kept, one layer's is the next one's too.
        each = layers if self.keeps else 1
        size = (each, rows if self.keeps else 0, width)
        self._sources_LNR = self._blank((each, rows, rank), dtype=torch.float32)
        self._taken_LND = self._blank(size, dtype=h_BTD.dtype)
        self.sources = self._sources_LNR.unbind(0) * (layers // each)
        self.taken = self._taken_LND.unbind(0) * (layers // each)

    def grads(self, layer: int) -> tuple[Tensor, Tensor]:
        """Where to leave gradients of a layer's rows (N, D), and of Mh + b (N, R)."""
        backward = torch._C._current_graph_task_id()
        if self._grads is None or self._backward != backward:
            self._backward = backward
            taken_LND, sources_LNR = self._taken_LND, self._sources_LNR
            self._grads = (
                self._blank(taken_LND.shape, dtype=taken_LND.dtype),
                self._blank(sources_LNR.shape, dtype=sources_LNR.dtype),
            )
            by_layer = (one.unbind(0) for one in self._grads)
            self._grads_by_layer = list(zip(*by_layer, strict=True))
        return self._grads_by_layer[layer]

    def number_gradients(self) -> list[Tensor]:
        """Of all layers' and sides' W (L·sides, R, D), where there are any, then of b
        (L·sides, R), then of P, from what this backward left."""
        grads, self._grads = self._grads, None
        assert grads is not None, "a layer comes first"
        layers, sides = len(self._taken_LND), len(self.rows)
        width, rank = self.sizes["D"], self.sizes["R"]
        has_weight = self.sizes["HAS_WEIGHT"]
        grad_P = self._sources_LNR.new_empty(layers * sides, rank, width)
        grad_W = torch.empty_like(grad_P) if has_weight else grad_P
        grad_b = self._sources_LNR.new_empty(layers * sides, rank)
        blocks, how = by_columns(self.rows, width, rank, layers)
        with on(grad_P.device):
            self.kernels.edit_weights_backward[blocks](
                grads[0], self._taken_LND, self._sources_LNR, grads[1],
                grad_W, grad_b, grad_P, *self.counts[:2], **self.sizes, **how,
            )  # fmt: skip
        return [grad_W, grad_b, grad_P] if has_weight else [grad_b, grad_P]


class _Numbers(torch.autograd.Function):
    """A token for the layers, of all their numbers: W where there are any, b, and P or
    the vectors that it was rotated by."""

    @staticmethod
    def forward(
        ctx: Any, room: _Room, through: tuple[Kept, Backward] | None, *numbers: Tensor
    ) -> Tensor:
        ctx.room, ctx.rotate_backward = room, None
        if through:
            kept, ctx.rotate_backward = through
            ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return numbers[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        *others, last = ctx.room.number_gradients()
        if ctx.rotate_backward:
            last = ctx.rotate_backward(ctx.saved_tensors, last)
        own = [gradient for kind in (*others, last) for gradient in kind.unbind(0)]
        return None, None, *own


class _Edit(torch.autograd.Function):
    """A layer's hidden states with h + Pᵀ(Mh + b) at the rows of each side; ``numbers``
    are W, b and P of both sides."""

    @staticmethod
    def forward(
        ctx: Any,
        h_BTD: Tensor,
        token: Tensor,
        room: _Room,
        layer: int,
        numbers: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        weights, biases, matrices = numbers
        h_BTD = h_BTD.contiguous()
        out_BTD = h_BTD.clone()
        if any(room.rows):
            with on(h_BTD.device):
                room.kernels.edit_rows[room.blocks](
                    h_BTD, out_BTD, room.taken[layer], room.sources[layer],
                    *room.index, *weights, *biases, *matrices, *room.counts,
                    KEEP=room.keeps, **room.sizes, **room.how,
                )  # fmt: skip
        ctx.save_for_backward(*weights, *matrices)
        ctx.room, ctx.layer = room, layer
        return out_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        room, (passed_on, keeps, *_) = ctx.room, ctx.needs_input_grad
        grad_BTD = grad_BTD.contiguous()
        out_BTD = grad_BTD.clone() if passed_on else grad_BTD
        if keeps:
            kept_ND, grad_sources_NR = room.grads(ctx.layer)
        else:
            kept_ND, grad_sources_NR = grad_BTD, torch.empty_like(room.sources[0])
        if any(room.rows):
            with on(grad_BTD.device):
                room.kernels.edit_rows_backward[room.blocks](
                    grad_BTD, out_BTD, kept_ND, grad_sources_NR,
                    *room.index, *ctx.saved_tensors, *room.counts,
                    WRITE=passed_on, KEEP=keeps, **room.sizes, **room.how,
                )  # fmt: skip
        # None for the token: that there is one is what makes autograd go on to it.
        return out_BTD if passed_on else None, None, None, None, None


def by_rows(
    rows: Sequence[int], width: int, rank: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """How many programs of a kernel take how many rows, and columns at once."""
    several = 1 if sum(rows) <= _FEW_ROWS else 4
    padded = _power_of_two(rank)
    block = min(_PRODUCTS // (padded * several), _power_of_two(width))
    blocks = sum(-(-count // several) for count in rows)
    return (blocks,), {"RP": padded, "ROWS": several, "BLOCK": block, "num_warps": 8}


def by_columns(
    rows: Sequence[int], width: int, rank: int, layers: int = 1
) -> tuple[tuple[int, ...], dict[str, int]]:
    """The same, of the kernel whose programs take all rows of some columns."""
    padded = dot_size(rank)
    several = min(dot_size(max(rows)), 512 // padded)
    blocks = (-(-width // 64), len(rows), layers)
    return blocks, {"RP": padded, "ROWS": several, "BLOCK": 64, "num_warps": 4}


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _as_read(numbers: Sequence[Tensor]) -> list[Tensor]:
    """As kernels read them."""
    return [
        one
        if one.dtype is torch.float32 and one.is_contiguous()
        else one.float().contiguous()
        for one in numbers
    ]


def _kind(h_BTD: Tensor) -> tuple[Any, ...]:
    return h_BTD.dtype, h_BTD.device, h_BTD.numel()


def _two(sides: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A kernel's arguments for two sides; of one it never reads the second."""
    return sides[0], sides[-1]


def dot_size(number: int) -> int:
    """The next size that a kernel's products of matrices can have."""
    return max(_power_of_two(number), _SMALLEST_DOT)


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
