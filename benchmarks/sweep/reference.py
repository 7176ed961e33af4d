"""The plain reference: a copy of the bare base whose layers are edited by hooks.

Its layers and positions are found without the package's code: the layers by watching
which lists of modules a text runs through, the positions are written down by the check.

Shapes: B batch, T tokens, D hidden size, R rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from axolotl_reft.core.interventions import Intervention

# Two batches that tell the axes of hidden states: no two of the four are equal.
_PROBES = (2, 29), (3, 42)
Probes = tuple[tuple[int, int], ...]
Forward = Callable[[nn.Module, int, int], Any]


class NotFound(Exception):
    """The layers of the text model cannot be told from others by a text's way."""


@dataclass(frozen=True)
class Layers:
    """The list of layers that a text runs through.

    Attributes:
        path: of the list in the base.
        calls: of each layer in one forward.
        batch_axis: of the layers' outputs; None where rows are in one axis with tokens.
        time_axis: likewise.
        before: tokens that the model itself puts in front of the text.
        shapes: of the outputs, for the two probes.
        probes: rows and tokens of the two.
    """

    path: str
    count: int
    calls: tuple[int, ...]
    batch_axis: int | None
    time_axis: int
    before: int
    shapes: tuple[tuple[int, ...], ...]
    probes: Probes

    @property
    def plain(self) -> bool:
        return len(self.shapes[0]) == 3 and (self.batch_axis, self.time_axis) == (0, 1)

    def note(self) -> str:
        """Say what is unusual about the hidden states; empty where nothing is."""
        notes = [] if self.plain else [f"hidden states {self.shapes[0]}"]
        (_, tokens), (_, more) = self.probes
        sizes = [shape[self.time_axis] for shape in self.shapes]
        if self.batch_axis is not None and sizes != [tokens, more]:
            inside, more_inside = sizes
            notes.append(f"{tokens} tokens are {inside}, and {more} {more_inside}")
        if set(self.calls) != {1}:
            notes.append(f"layers run {self.calls} times a forward")
        return "; ".join(notes)


def find_layers(
    base: PreTrainedModel, width: int, forward: Forward, count: int
) -> Layers:
    """Return the outermost list of modules most of which are called, and return hidden
    states of this width and of the text's length, when the model reads a text with
    ``count`` tokens before it."""
    probes = tuple((rows, tokens + count) for rows, tokens in _PROBES)
    seen = [_watch(base, width, forward, *probe) for probe in probes]
    found = []
    for path, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            names = [f"{path}.{number}" for number in range(len(module))]
            calls = tuple(len(seen[0].get(name, ())) for name in names)
            called = [n for n in range(len(module)) if calls[n]]
            if 2 * len(called) <= len(module):
                continue
            first, second = (shapes[names[called[0]]][0] for shapes in seen)
            axes = _axes(first, second, probes)
            if axes is not None:
                found.append(
                    Layers(path, len(module), calls, *axes, (first, second), probes)
                )
    if not found:
        raise NotFound("no list of modules returns hidden states of the text")
    return min(found, key=lambda layers: layers.path.count("."))


def _axes(
    first: Sequence[int], second: Sequence[int], probes: Probes
) -> tuple[int | None, int, int] | None:
    """Return the axes of rows and tokens, and the tokens in front of the text's; None
    where a shape does not follow the text's."""
    (rows, tokens), (more_rows, more_tokens) = probes
    batch = time = None
    for axis, sizes in enumerate(zip(first, second, strict=True)):
        if sizes == (rows, more_rows) and batch is None:
            batch = axis
        elif sizes == (rows * tokens, more_rows * more_tokens):
            return None, axis, 0
        elif sizes[0] != sizes[1]:
            time = axis
    if batch is None or time is None:
        return None
    extra = first[time] - tokens
    return batch, time, extra if extra == second[time] - more_tokens else 0


def _watch(
    base: PreTrainedModel, width: int, forward: Forward, rows: int, tokens: int
) -> dict[str, list[tuple[int, ...]]]:
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def note(path: str, output: Any) -> Any:
        h = _hidden_states(output)
        if h is not None and width in h.shape:
            shapes.setdefault(path, []).append(tuple(h.shape))
        return output

    watched = copy.deepcopy(base)
    for path, module in watched.named_modules():
        _after(module, partial(note, path))
    with torch.no_grad():
        forward(watched, rows, tokens)
    return shapes


def _after(module: nn.Module, change: Callable[[Any], Any]) -> None:
    """Change what a module returns; not by a hook, which SqueezeBERT passes over."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: change(forward(*args, **kwargs))


def _hidden_states(output: Any) -> Tensor | None:
    if isinstance(output, dict):
        output = next(iter(output.values()), None)
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) and output.ndim > 1 else None


class Reference:
    """A copy of the base that edits the columns which it is told, in every layer.

    Args:
        interventions: of the adapter, one a layer; their parameters are used as they
            are, so that gradients can be compared.
    """

    def __init__(
        self, base: PreTrainedModel, layers: Layers, interventions: list[Intervention]
    ) -> None:
        self.model = copy.deepcopy(base)
        self.model.requires_grad_(False)
        self.layers = layers
        self._columns: list[list[int]] | None = None
        self._prompt = 0
        modules = self.model.get_submodule(layers.path)
        for module, intervention in zip(modules, interventions, strict=True):
            _after(module, partial(self._edit_output, intervention))

    def edit(self, columns: list[list[int]] | None, prompt: int = 0) -> PreTrainedModel:
        """Return the model that edits these columns of each row, in forwards of at
        least ``prompt`` tokens; None for every token of every forward."""
        self._columns, self._prompt = columns, prompt
        return self.model

    def _edit_output(self, intervention: Intervention, output: Any) -> Any:
        h = _hidden_states(output)
        assert h is not None
        edited = self._edited(h, intervention)
        if isinstance(output, Tensor):
            return edited
        if isinstance(output, dict):
            return {**output, next(iter(output)): edited}
        changed = [edited, *output[1:]]
        # A named tuple takes its fields one by one.
        if hasattr(output, "_fields"):
            return type(output)(*changed)
        return type(output)(changed)

    def _edited(self, h: Tensor, intervention: Intervention) -> Tensor:
        batch, time = self.layers.batch_axis, self.layers.time_axis
        if batch is None:
            rows = len(self._columns or [0])
            h = h.unflatten(time, (rows, -1))
            batch, time = time, time + 1
        # The width is last, or it is the axis that is left, as in (B, D, T).
        order: tuple[tuple[int, ...], tuple[int, ...]] = ((batch, time), (0, 1))
        if time == h.ndim - 1:
            order = ((batch, time, 3 - batch - time), (0, 1, 2))
        h_BTD = h.movedim(*order)
        new_BTD, before = h_BTD.clone(), self.layers.before
        if self._columns is None:
            new_BTD[:, before:] = change(h_BTD[:, before:], intervention)
        elif h_BTD.shape[1] >= self._prompt:
            for row, columns in enumerate(self._columns):
                at = [before + column for column in columns]
                new_BTD[row, at] = change(h_BTD[row, at], intervention)
        new = new_BTD.movedim(order[1], order[0])
        return new.flatten(batch, time) if self.layers.batch_axis is None else new


def change(h: Tensor, intervention: Intervention) -> Tensor:
    """Return h + Rᵀ(Wh + b − Rh)."""
    r_DR = intervention.rotate_layer.weight
    source = intervention.learned_source
    return h + (h @ source.weight.T + source.bias - h @ r_DR) @ r_DR.T
