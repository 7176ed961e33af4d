"""The state of a forward, of a thread, and of a model with its edited layers.

Shapes: B batch, T tokens, N edited positions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from axolotl_reft.core.affine import StackCache
from axolotl_reft.core.scatter import EditIndices
from axolotl_reft.prompts.generation import Generation
from axolotl_reft.prompts.spans import PromptSpans, edit_indices
from axolotl_reft.prompts.turns import Turns
from axolotl_reft.settings.spec import AdapterSpec
from axolotl_reft.tuner.adapter_rows import AdapterRows
from axolotl_reft.tuner.prompt_sources import PromptSource

# The argument of a model's forward with what a collator found: the shape (B, T) of its
# batch, and for each adapter the indices of each intervention.
POSITIONS = "loreft_positions"


@dataclass(eq=False)
class ForwardContext:
    """One forward of the model: its prompts and edited positions, found once.

    Attributes:
        source: where prompts are read from.
        adapters: settings of the model's adapters, by name.
        adapter_rows: the adapters of the batch's rows; None where the active ones edit
            all rows.
        given: indices that a collator found, by adapter.
        is_compiled: the model is, and with it the layers.
        plan: the edits that were made ready for several layers together.
        edited_outputs: by the id of a layer's output, what it was edited to, where
            hidden states are asked for: transformers records them unedited.
    """

    source: PromptSource
    adapters: Mapping[str, AdapterSpec]
    adapter_rows: AdapterRows | None = None
    given: Mapping[str, Sequence[Tensor]] | None = None
    is_compiled: bool = False
    plan: Any = None
    edited_outputs: dict[int, Tensor] | None = None
    _spans: dict[Turns, PromptSpans | None] = field(default_factory=dict)
    _indices: dict[str, EditIndices | None] = field(default_factory=dict)
    _tokens: dict[str, EditIndices] = field(default_factory=dict)
    _is_decode_step: bool | None = None

    @property
    def is_decode_step(self) -> bool:
        """Whether the cache is filled and no adapter has a prompt in this forward."""
        if self._is_decode_step is None:
            self._is_decode_step = self.source.is_decode_step or (
                self.source.past > 0
                and all(
                    self.spans(turns) is None for turns in prompt_turns(self.adapters)
                )
            )
        return self._is_decode_step

    def spans(self, turns: Turns) -> PromptSpans | None:
        """Return the prompts of such turns; None when there is none."""
        if turns not in self._spans:
            self._spans[turns] = self.source.spans(turns)
        return self._spans[turns]

    def indices(self, adapter: str) -> EditIndices | None:
        """Return what the adapter edits at its positions, the same for all layers; None
        when this forward has no prompt in it."""
        if adapter not in self._indices:
            self._indices[adapter] = self._find_indices(adapter)
        return self._indices[adapter]

    @property
    def has_found_prompts(self) -> bool:
        """Whether a layer has asked for prompts."""
        return bool(self._spans or self._indices)

    def has_no_prompt(self) -> bool:
        """Whether none of the prompts that were asked for has a token."""
        spans = [found for found in self._spans.values() if found is not None]
        if spans:
            return not any(found.inside_BT.any() for found in spans)
        return not any(sum(i.sizes) for i in self._indices.values() if i is not None)

    def _find_indices(self, adapter: str) -> EditIndices | None:
        if self.given is not None and adapter in self.given:
            return EditIndices(tuple(self.given[adapter]))
        spec = self.adapters[adapter]
        spans = self.spans(spec.turns)
        if spans is None:
            return None
        rows, rows_B1 = self.source.shape[0], None
        if self.adapter_rows is not None:
            rows_B1 = self.adapter_rows.mask(adapter, spans.inside_BT.device)
            rows = self.adapter_rows.count(adapter)
        most = self._most_prompts(spec.turns, rows, spans.inside_BT.device)
        return edit_indices(spans, spec.positions, spec.tied, most, rows_B1)

    def _most_prompts(
        self, turns: Turns, rows: int, device: torch.device
    ) -> int | None:
        """Return how many prompts to reserve slots for; None where they can be counted.

        Counting is free on a CPU, and makes the host wait for an accelerator, once a
        forward, unless a row has one prompt; a graph cannot wait.
        """
        compiling = torch.compiler.is_compiling()
        if device.type == "cpu" and not compiling:
            return None
        if self.source.one_sample_rows and not turns.every:
            return rows
        return self.source.shape[0] * self.source.shape[1] if compiling else None

    def row_tokens(self, adapter: str, h_BTD: Tensor) -> EditIndices:
        """Return the indices into B·T of all tokens in the adapter's rows.

        Raises:
            RuntimeError: these are not the hidden states of all tokens.
        """
        assert self.adapter_rows is not None
        rows, width = self.source.shape
        states = h_BTD.shape[:-1].numel()
        if states != rows * width:
            raise RuntimeError(
                f"adapter_names: a module that an adapter edits got {states} vectors "
                f"of a batch of {rows * width} tokens, as experts do, so that their "
                "rows are not known; run one adapter after the other"
            )
        if adapter not in self._tokens:
            tokens_N = self.adapter_rows.tokens(adapter, width, h_BTD.device)
            self._tokens[adapter] = EditIndices((tokens_N,))
        return self._tokens[adapter]

    def record(self, before: Tensor, after: Tensor) -> None:
        """Note a layer's output before and after its edit."""
        if self.edited_outputs is not None and after is not before:
            self.edited_outputs[id(before)] = after


def prompt_turns(adapters: Mapping[str, AdapterSpec]) -> set[Turns]:
    """Return the turns whose prompts these adapters ask for."""
    return {spec.turns for spec in adapters.values() if not spec.positions.everywhere}


@dataclass(eq=False)
class ThreadState:
    """The state of a thread.

    Attributes:
        labels, given: arguments of the model, for its backbone.
        generation: inside ``generate``.
        adapter_names: those of a batch's rows.
        context: of the forward.
    """

    labels: Tensor | None = None
    given: Mapping[str, Any] | None = None
    generation: Generation | None = None
    adapter_names: Sequence[str] | None = None
    context: ForwardContext | None = None


class _ThreadLocal(threading.local):
    """One state a thread: a server may answer in many.

    In an object of its own: what compiled code sets on a ``threading.local`` is lost
    where its graph breaks (torch 2.13).
    """

    def __init__(self) -> None:  # in each thread
        self.state = ThreadState()

    def __reduce__(self) -> tuple[type[_ThreadLocal], tuple[()]]:
        return type(self), ()  # a copy of the model has nothing under way


class ModelState:
    """The state that a model's edited layers and its hooks share.

    Attributes:
        adapters: settings of the adapters, by name.
        layers: the edited layers, in the order of the model.
        stacks: stacked parameters that are kept in eval mode, by group of layers.
        find_answers: for a trainer that gives the model no labels: the ids (B, T) of a
            forward to a mask of its answer tokens, (B, T) or (1, T); raises for ids it
            does not know. Asked only where something of the forward is edited.
    """

    find_answers: Callable[[Tensor], Tensor] | None = None

    def __init__(self) -> None:
        self.adapters: dict[str, AdapterSpec] = {}
        self.layers: list[Any] = []
        self.stacks: dict[Any, StackCache] = {}
        self._threads = _ThreadLocal()

    @property
    def thread(self) -> ThreadState:
        """The state of this thread."""
        return self._threads.state

    @property
    def context(self) -> ForwardContext:
        """The forward under way in this thread.

        Raises:
            RuntimeError: there is none.
        """
        context = self._threads.state.context
        if context is None:
            raise RuntimeError(
                "a LoReFT layer was called outside a forward of its model, so it "
                "cannot know the prompt; call the model instead of its layers"
            )
        return context

    @contextmanager
    def adapters_by_row(self, names: Sequence[str]) -> Iterator[None]:
        """Within it, each row of a batch is edited by the adapter named for it."""
        state = self.thread
        state.adapter_names = names
        try:
            yield
        finally:
            state.adapter_names = None

    def replayable(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same function, which sees today's forward whenever it runs again.

        Gradient checkpointing runs a layer's forward again in backward, when another
        forward may be under way or none.
        """
        context = self.thread.context

        def with_context(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # the graph holds the positions
                return function(*args, **kwargs)
            state = self.thread
            outer, state.context = state.context, context
            try:
                return function(*args, **kwargs)
            finally:
                state.context = outer

        return with_context
