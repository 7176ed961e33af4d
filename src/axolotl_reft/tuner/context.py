"""The state of a forward, of a thread, and of a model with its edited layers.

Shapes: B batch, T tokens, N edited positions.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from axolotl_reft.core.affine import StackCache
from axolotl_reft.core.scatter import EditIndices
from axolotl_reft.core.strength import Strength
from axolotl_reft.prompts.cached import Adapters, CacheRecord
from axolotl_reft.prompts.generation import Generation
from axolotl_reft.prompts.spans import PromptSpans, edit_indices
from axolotl_reft.prompts.turns import Turns
from axolotl_reft.settings.spec import AdapterSpec
from axolotl_reft.tuner.layout import Layout

if TYPE_CHECKING:
    from axolotl_reft.tuner.layer import LoreftDecoderLayer

# A model's argument with what a collator found: the shape (B, T) of its batch, and the
# indices of each adapter's interventions.
POSITIONS = "loreft_positions"
# PEFT's name for no adapter, among those of a batch's rows.
BASE = "__base__"

# Returns the prompts of such turns, None where there is none.
FindSpans = Callable[[Turns], PromptSpans | None]
# The adapter of a row, and its strength.
RowAdapter = tuple[str, float]
# By adapter; those that are not here are 1.
Strengths = Mapping[str, Strength]
# Edits hidden states (B, T, D) at these indices; None for all tokens.
Edit = Callable[[Tensor, EditIndices | None], Tensor]


@dataclass(frozen=True, eq=False)
class OnHost:
    """A batch's tensors as a collator made them, and the indices that it found in them.
    Of no type that trainers look into, so that it stays where it is."""

    tensors: Mapping[str, Tensor]
    indices: Mapping[str, Sequence[Tensor]]


@dataclass(eq=False)
class ForwardContext:
    """One forward of the model: its prompts and edited positions, found once.

    Attributes:
        find_spans: None in a decode step, which has no prompt.
        past: columns in the cache before the forward.
        packed: a row may hold several samples.
        find_answers: returns the mask of the answers, (B, T) or (1, T), where labels or
            a trainer tell them.
        is_compiled: the model is, and with it the layers.
        row_adapters: of each row; None where the active adapters edit all rows.
        strengths: of the adapters, so that all layers and replays have the same.
        given: indices that a collator found, by adapter; on_host: with its batch.
        prepared: edits of several layers from one stack, by layer, site and adapter;
            each is taken once.
        edited_outputs: unedited and edited states by the id of the unedited, which
            transformers records; None where hidden states are not asked for.
        is_prepared: ``generate`` prepared it as one of its steps.
        make_record: makes the record of the cache that the forward fills; None where it
            cannot be told.
    """

    shape: tuple[int, int]
    adapters: Mapping[str, AdapterSpec]
    find_spans: FindSpans | None
    past: int = 0
    packed: bool = False
    find_answers: Callable[[], Tensor] | None = None
    is_compiled: bool = field(default_factory=torch.compiler.is_compiling)
    row_adapters: list[str] | None = None
    strengths: Strengths = field(default_factory=dict)
    given: Mapping[str, Sequence[Tensor]] | None = None
    on_host: OnHost | None = None
    prepared: dict[tuple[nn.Module, str, str], Edit] = field(default_factory=dict)
    edited_outputs: dict[int, tuple[Tensor, Tensor]] | None = None
    is_prepared: bool = False
    make_record: Callable[[], CacheRecord | None] | None = None
    _spans: dict[Turns, PromptSpans | None] = field(default_factory=dict)
    _indices: dict[str, EditIndices | None] = field(default_factory=dict)
    _tokens: dict[str, EditIndices] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.is_decode_step = self.find_spans is None

    def spans(self, turns: Turns) -> PromptSpans | None:
        """Return the prompts of such turns; None when there is none."""
        if turns not in self._spans:
            self._spans[turns] = self.find_spans(turns) if self.find_spans else None
        return self._spans[turns]

    def indices(self, adapter: str) -> EditIndices | None:
        """Return the adapter's positions; None when this forward has no prompt."""
        if adapter not in self._indices:
            self._indices[adapter] = self._find_indices(adapter)
        return self._indices[adapter]

    def _find_indices(self, adapter: str) -> EditIndices | None:
        if self.given is not None and adapter in self.given:
            return EditIndices(tuple(self.given[adapter]))
        spec = self.adapters[adapter]
        spans = self.spans(spec.turns)
        if spans is None:
            return None
        device, rows, rows_B1 = spans.inside_BT.device, self.shape[0], None
        if self.row_adapters is not None:
            rows = self.row_adapters.count(adapter)
            has_it = [[name == adapter] for name in self.row_adapters]
            rows_B1 = torch.tensor(has_it, device=device)
        # To count prompts the host waits for an accelerator, and a graph and the meta
        # device cannot: slots are reserved for as many as there may be.
        cannot_count = torch.compiler.is_compiling() or device.type == "meta"
        most = None
        if cannot_count or device.type != "cpu":
            if not (self.packed or spec.turns.every):
                most = rows
            elif cannot_count:
                most = math.prod(self.shape)
        return edit_indices(spans, spec.positions, spec.tied, most, rows_B1)

    def warn_without_prompt(self) -> bool:
        """Warn where all prompts are empty; return whether a layer asked for any."""
        has_prompt = [bool(s.inside_BT.any()) for s in self._spans.values() if s]
        if not has_prompt:
            has_prompt = [any(i.sizes) for i in self._indices.values() if i]
        if has_prompt and not any(has_prompt):
            warnings.warn(
                "LoReFT: every token of the first batch is trained, so it has no "
                "prompt and nothing is edited. Set the labels of prompt tokens to "
                "-100 (train_on_inputs: false), or use positions: all",
                UserWarning,
                stacklevel=2,
            )
        return bool(has_prompt)

    def row_tokens(self, adapter: str, device: torch.device) -> EditIndices | None:
        """Return the indices into B·T of all tokens in the adapter's rows; None where
        it edits all rows."""
        if self.row_adapters is None:
            return None
        if adapter not in self._tokens:
            width = self.shape[1]
            starts = [
                n * width for n, a in enumerate(self.row_adapters) if a == adapter
            ]
            starts_N1 = torch.tensor(starts, device=device).unsqueeze(1)
            tokens_NT = starts_N1 + torch.arange(width, device=device)
            self._tokens[adapter] = EditIndices((tokens_NT.flatten(),))
        return self._tokens[adapter]


def repeat_rows(
    given: Sequence[RowAdapter], rows: int, expands: bool = True
) -> list[RowAdapter]:
    """Return the adapter of each row, of which ``generate`` makes copies side by side
    for beams; ValueError for another number of them (PEFT's message)."""
    copies, rest = divmod(rows, len(given)) if given else (0, rows)
    if rest or (copies != 1 and not expands):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but "
            f"got {len(given)} and {rows} respectively."
        )
    return [row for row in given for _ in range(copies)]


def strengths_by_row(adapters: Adapters, device: torch.device) -> Strengths:
    """Return the strengths of rows' adapters: of one that has several, each row's."""
    found: dict[str, Strength] = {}
    every_B = adapters.strengths
    for name in {*adapters.names} - {BASE}:
        of_rows = {s for s in adapters.rows(name, len(every_B)) if s is not None}
        if len(of_rows) > 1:
            found[name] = torch.tensor(every_B, device=device).view(-1, 1, 1)
        elif of_rows != {1.0}:
            found[name] = of_rows.pop()
    return found


@dataclass(eq=False)
class ThreadState:
    """The state of a thread."""

    labels: Tensor | None = None  # of the model, for its backbone
    given: Mapping[str, Any] | None = None  # by a collator, under POSITIONS
    mask: Any = None  # of the model, for a backbone that takes none
    generation: Generation | None = None
    step: Generation | None = None  # that it has prepared, for the next forward
    row_adapters: Sequence[RowAdapter] | None = None  # of a batch
    context: ForwardContext | None = None
    backbone: nn.Module | None = None  # whose forward made the context
    below: Tensor | None = None  # what the layers below the first edited one return
    stops_below: bool = False  # the forward ends behind these layers


class _ThreadLocal(threading.local):
    """One state a thread, in an object of its own: what compiled code sets on a
    ``threading.local`` is lost where its graph breaks (torch 2.13)."""

    def __init__(self) -> None:  # in each thread
        self.state = ThreadState()

    def __reduce__(self) -> tuple[type[_ThreadLocal], tuple[()]]:
        return type(self), ()  # a copy of the model has nothing under way


class ModelState:
    """The state that a model's edited layers and its hooks share.

    Attributes:
        adapters: settings of the adapters, by name.
        strengths: those of the adapters that are not 1, never changed in place.
        layout: of the model's hidden states.
        change_every_token: names of those that do not stop at prompt positions.
        layers: the edited layers, in the order of the model.
        stacks: stacked parameters that are kept in eval mode, by group of layers.
        find_answers: set by a trainer that gives the model no labels: maps the ids
            (B, T) of a forward to the mask (B, T) or (1, T) of its answers, and raises
            for unknown ids. Asked only where something of the forward is edited.
        trainer: the name of a trainer that trains on answers alone, so that a training
            forward without them is an error.
    """

    find_answers: Callable[[Tensor], Tensor] | None = None
    trainer: str | None = None

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.adapters: dict[str, AdapterSpec] = {}
        self.strengths: Mapping[str, float] = {}
        self.change_every_token: set[str] = set()
        self.layers: list[LoreftDecoderLayer] = []
        self.stacks: dict[Hashable, StackCache] = {}
        self._threads = _ThreadLocal()

    @property
    def thread(self) -> ThreadState:
        return self._threads.state

    def forget_adapter(self, name: str) -> None:
        """Forget the settings of an adapter, and its strength."""
        self.adapters.pop(name, None)
        self.change_every_token.discard(name)
        self.set_strength(name, 1.0)
        self.stacks.clear()

    def set_strength(self, adapter: str, strength: float) -> None:
        """Set the strength of an adapter in the forwards that begin from now on."""
        others = {n: s for n, s in self.strengths.items() if n != adapter}
        self.strengths = others if strength == 1 else {**others, adapter: strength}

    def strength(self, adapter: str) -> Strength:
        """Return the strength in the forward under way in this thread, or the next."""
        return (self.thread.context or self).strengths.get(adapter)

    def with_strength(self, names: list[str]) -> list[str]:
        """Return the adapters that may change a forward: without those of strength 0,
        unless their parameters may be asked for gradients."""
        strengths = (self.thread.context or self).strengths
        if not strengths or torch.is_grad_enabled():
            return names
        none = {n for n, s in strengths.items() if isinstance(s, float) and s == 0}
        return [name for name in names if name not in none]

    def active_adapters(self, rows: int) -> Adapters:
        """Return the adapters of the next forward in this thread."""
        layer, given = self.layers[0], self.thread.row_adapters
        if layer._disable_adapters:
            return Adapters((), ())
        if given is None:
            # A list since set_adapter; PEFT's property makes two more calls.
            names = tuple(layer._active_adapter)
            return Adapters(names, tuple(self.strengths.get(n, 1.0) for n in names))
        expands = self.thread.generation is not None
        names, strengths = zip(*repeat_rows(given, rows, expands), strict=True)
        return Adapters(names, strengths, by_row=True)

    def turns(self, adapters: Adapters) -> set[Turns]:
        """Return the turns whose prompts these adapters edit."""
        specs = [self.adapters[name] for name in {*adapters.names} - {BASE}]
        return {spec.turns for spec in specs if not spec.positions.everywhere}

    @property
    def context(self) -> ForwardContext:
        """The forward under way in this thread; RuntimeError where there is none."""
        context = self._threads.state.context
        if context is None:
            raise RuntimeError(
                "a LoReFT layer was called outside a forward of its model, so it "
                "cannot know the prompt; call the model instead of its layers"
            )
        return context
