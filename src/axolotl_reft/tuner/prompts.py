"""What a forward's own inputs say about the prompts in it.

One tracker a model, shared by all its edited layers. It hangs on the model by public
hooks, so that it also works where PEFT's tuner object is passed over: inner steps of
``generate``, and models from ``AutoModel.from_pretrained(adapter)``.

Shapes: B batch, T tokens of this forward, W columns seen so far (the cache's and T).
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from axolotl_reft.core.shared_rotations import shared_rotations
from axolotl_reft.kernels import dispatch as fused
from axolotl_reft.prompts.generation import Conversations, Generation, Tokens
from axolotl_reft.prompts.positions import (
    Positions,
    PromptRuns,
    PromptSpans,
    any_in_sample,
    flat_indices,
)
from axolotl_reft.prompts.turns import Turns
from axolotl_reft.tuner.adapter_rows import AdapterRows, wrong_length
from axolotl_reft.tuner.compat import cache_of, pages_of

# The argument of a model's forward that says how many prompts there are at most.
PROMPTS = "loreft_prompts"


@dataclass
class _Batch:
    """The forward under way: its spans and their indices, made when asked for.

    Attributes:
        shape: B and T.
        find: the prompts of such turns; None for none.
        one_sample_rows: no row holds several packed samples.
        past: columns in the cache before it; where the prompt has gone by, at least so
            many.
        compiled: the model is, and with it the layers.
        most: how many prompts there are at most, where that was told.
        planned: by layer, what edits its hidden states, where it was made ready; None
            once it has.
        planned_on: the devices on whose layers that was tried.
        prepared: what was made ready of it beforehand.
    """

    shape: tuple[int, int]
    find: Callable[[Turns], PromptRuns | PromptSpans | None]
    one_sample_rows: bool
    past: int = 0
    most: int | None = None
    adapter_rows: AdapterRows | None = None
    found: dict[Turns, PromptRuns | PromptSpans | None] = field(default_factory=dict)
    indices: dict[
        tuple[Positions, Turns, bool, str | None], tuple[Tensor, ...] | None
    ] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    gone_by: bool | None = None
    compiled: bool = False
    rotations: dict[Any, Tensor] | None = None
    planned: dict[Any, Callable[[Tensor], Tensor] | None] = field(default_factory=dict)
    planned_on: set[torch.device] = field(default_factory=set)
    prepared: list[fused.Alike] | None = None
    _only_edits: dict[Any, tuple[str, list[Any]]] | None = None

    def only_edits(self, layers: Sequence[Any]) -> dict[Any, tuple[str, list[Any]]]:
        """By layer what its ``only_edit`` says, of the layers to which no more happens;
        asked once."""
        if self._only_edits is None:
            said = ((layer, layer.only_edit()) for layer in layers)
            self._only_edits = {layer: only for layer, only in said if only}
        return self._only_edits

    def runs(self, turns: Turns) -> PromptRuns | PromptSpans | None:
        """The prompts, as they were found."""
        if turns not in self.found:
            self.found[turns] = self.find(turns)
        return self.found[turns]

    def prompts(self, turns: Turns) -> PromptSpans | None:
        """The prompts, with the place of every token."""
        found = self.runs(turns)
        if isinstance(found, PromptRuns):
            found = self.found[turns] = found.spans()
        return found


@dataclass(eq=False)
class _UnderWay:
    """What is under way in a thread.

    Attributes:
        labels, told_prompts: arguments of the model, for its backbone.
        generation: inside ``generate``.
        adapter_names: those of a batch's rows.
        batch: the forward.
        edited_outputs: by the id of what transformers records in the place of each.
    """

    labels: Tensor | None = None
    told_prompts: int | None = None
    generation: Generation | None = None
    adapter_names: Sequence[str] | None = None
    batch: _Batch | None = None
    edited_outputs: dict[int, Tensor] | None = None


class _Threads(threading.local):
    """What is under way, by thread, which a server may have many of.

    In an object of its own: what compiled code sets on a ``threading.local`` is lost
    where its graph breaks (torch 2.13).
    """

    def __init__(self) -> None:  # in each thread
        self.own = _UnderWay()

    def __reduce__(self) -> tuple[type[_Threads], tuple[()]]:
        return type(self), ()  # a copy of the model has nothing under way


class _Override:
    """A method of one model in the place of its class's, with the same signature:
    ``generate`` reads the parameters of ``prepare_inputs_for_generation``."""

    def __init__(self, model: nn.Module, name: str, method: Callable[..., Any]) -> None:
        self._model, self._name, self._method = model, name, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        own = getattr(type(self._model), self._name)
        return inspect.signature(own.__get__(self._model))


class PromptTracker:
    """Turns each forward's labels, masks and cache into edited positions, once.

    Where an adapter knows the marks of a chat template (``turn_markers``) and a sample
    has them, the marks tell its prompts, in training and at inference. Elsewhere,

    - in a forward with labels, the prompt is everything before the first trained
      token, and with ``turns: every`` what stands between trained tokens as well;
    - where a trainer that keeps the labels to itself has set ``find_answers``, the
      same of its answer tokens;
    - while ``generate`` runs, what was handed to it, cached or not, at every step,
      except what it had answered on the same cache before;
    - in any other forward without a cache, the whole sample;
    - with a filled cache, nothing: the prompt has gone by.

    Attributes:
        layers: the model's layers that ask.
        find_answers: for a trainer that gives the model no labels: the ids (B, T) of a
            forward to a mask of its answer tokens, (B, T) or (1, T); raises for ids it
            does not know. Asked only where something of the forward is edited.
    """

    find_answers: Callable[[Tensor], Tensor] | None = None

    def __init__(self, model: PreTrainedModel, backbone: nn.Module) -> None:
        self._threads = _Threads()
        self._conversations = Conversations()
        self.layers: list[Any] = []
        self._turns: dict[str, Turns] = {}
        self._checked = False
        can_generate = getattr(model, "can_generate", None)
        # A classifier's labels are not tokens of an answer.
        self._labels_mark_answers = bool(can_generate and can_generate())
        self._model = model
        self._parameters = list(inspect.signature(backbone.forward).parameters)
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            backbone.register_forward_pre_hook(self._before_backbone, with_kwargs=True),
            backbone.register_forward_hook(self._after_backbone, with_kwargs=True),
        ]
        if self._labels_mark_answers:
            for name, method in self._overrides().items():
                model.__dict__[name] = _Override(model, name, method)

    def detach(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for name in self._overrides():
            self._model.__dict__.pop(name, None)

    def _overrides(self) -> dict[str, Callable[..., Any]]:
        methods = {
            "generate": self._generate,
            "prepare_inputs_for_generation": self._prepare_inputs,
            "init_continuous_batching": self._init_continuous_batching,
        }
        return {n: own for n, own in methods.items() if hasattr(type(self._model), n)}

    @contextmanager
    def adapters_by_row(self, names: Sequence[str]) -> Iterator[None]:
        """Within it, each row of a batch is edited by the adapter named for it."""
        self._now.adapter_names = names
        try:
            yield
        finally:
            self._now.adapter_names = None

    @property
    def adapter_names(self) -> Sequence[str] | None:
        """Within :meth:`adapters_by_row`, what it was given."""
        return self._now.adapter_names

    @property
    def _now(self) -> _UnderWay:
        return self._threads.own

    # --- what layers ask -----------------------------------------------------------

    def watch(self, adapter: str, turns: Turns) -> None:
        """An adapter is there that asks for the prompts of such turns."""
        self._turns[adapter] = turns

    def unwatch(self, adapter: str) -> None:
        """It is there no more, or asks for none."""
        self._turns.pop(adapter, None)

    @property
    def turns(self) -> set[Turns]:
        """Whose prompts the model's adapters ask for."""
        return set(self._turns.values())

    @property
    def adapter_rows(self) -> AdapterRows | None:
        """The adapters of this forward's rows; None where the active ones edit all."""
        return None if self._now.batch is None else self._now.batch.adapter_rows

    def tokens(self, adapter: str, h_BTD: Tensor) -> Tensor:
        """Flat indices (N,) into B·T of all tokens in the adapter's rows.

        Raises:
            RuntimeError: these are not the vectors of all tokens.
        """
        batch = self._now.batch
        assert batch is not None and batch.adapter_rows is not None
        vectors, tokens = h_BTD.shape[:-1].numel(), batch.shape[0] * batch.shape[1]
        if vectors != tokens:
            raise RuntimeError(
                f"adapter_names: a module that an adapter edits got {vectors} vectors "
                f"of a batch of {tokens} tokens, as experts do, so that their rows are "
                "not known; run one adapter after the other"
            )
        if adapter not in batch.tokens:
            batch.tokens[adapter] = batch.adapter_rows.tokens(
                adapter, batch.shape[1], h_BTD.device
            )
        return batch.tokens[adapter]

    def indices(
        self,
        positions: Positions,
        turns: Turns,
        tied: bool,
        adapter: str | None = None,
    ) -> tuple[Tensor, ...] | None:
        """Flat indices (N,) into B·T of what each intervention of a layer edits.

        Args:
            adapter: whose rows alone are meant where rows have adapters of their own.

        Returns:
            One tensor, or two for untied prefix and suffix; None when this forward has
            no prompt in it.

        Raises:
            RuntimeError: the layer was called outside a forward of the model.
        """
        batch = self._now.batch
        if batch is None:
            raise RuntimeError(
                "a LoReFT layer was called outside a forward of its model, so it "
                "cannot know the prompt; call the model instead of its layers"
            )
        key = (positions, turns, tied, adapter if batch.adapter_rows else None)
        if key not in batch.indices:
            batch.indices[key] = _indices(batch, *key)
        return batch.indices[key]

    @property
    def prompt_has_gone_by(self) -> bool:
        """Whether this forward has a filled cache and no prompt of any adapter: a
        decode step."""
        batch = self._now.batch
        if batch is None or not batch.past:
            return False
        if batch.gone_by is None:
            batch.gone_by = all(batch.prompts(turns) is None for turns in self.turns)
        return batch.gone_by

    def rotations(self) -> dict[Any, Tensor]:
        """By intervention, the matrices (R, D) of all layers' outer edits, where they
        are made for all at once: in a forward with gradients, without those that are
        planned or will be, and in one that is compiled with its layers. None in others:
        without gradients interventions keep their own, and a layer that is compiled by
        itself makes its own."""
        batch = self._now.batch
        if batch is None:
            return {}
        gradients, compiling = torch.is_grad_enabled(), torch.compiler.is_compiling()
        if not (batch.compiled if compiling else gradients):
            return {}
        if batch.rotations is None:
            planned = set(batch.planned)
            for group in batch.prepared or ():
                if group.device not in batch.planned_on:
                    planned.update(group.layers)
            others = [layer for layer in self.layers if layer not in planned]
            some = [one for layer in others for one in layer.outer_interventions()]
            batch.rotations = shared_rotations(some)
        return batch.rotations

    def _prepare(self, batch: _Batch) -> list[fused.Alike]:
        """What the kernels need and no hidden states tell."""
        if batch.prepared is None:
            batch.prepared = fused.prepare(batch.only_edits(self.layers))
        return batch.prepared

    def plan(self, layer: Any, h_BTD: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What :meth:`planned` returns, made ready with the other layers' on the device
        if the layer is the first there to be edited; None without the kernels.

        Called once a device is at work on the layer itself, which takes it longer."""
        batch, device = self._now.batch, h_BTD.device
        if batch is None or not self._turns or device in batch.planned_on:
            return None
        if not fused.run_on(device) or layer not in batch.only_edits(self.layers):
            return None
        batch.planned_on.add(device)
        batch.planned |= fused.plan(h_BTD, self._prepare(batch))
        return self.planned(layer)

    def planned(self, layer: Any) -> Callable[[Tensor], Tensor] | None:
        """What edits a layer's hidden states in the forward under way, where that is
        all that happens to it and is ready; once."""
        batch = self._now.batch
        if batch is None:
            return None
        ready = batch.planned.get(layer)
        if ready is not None:
            batch.planned[layer] = None
        return ready

    def prompts(self, turns: Turns) -> PromptSpans | None:
        """The prompts in the forward under way; None when there is none in it."""
        assert self._now.batch is not None, "asked within a forward"
        return self._now.batch.prompts(turns)

    def record(self, before: Tensor, after: Tensor) -> None:
        """Note a layer's output before and after its edit, where hidden states are
        asked for: transformers records them inside the wrapper, unedited."""
        if self._now.edited_outputs is not None:
            self._now.edited_outputs[id(before)] = after

    def replayable(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which sees the batch of now whenever it runs again."""
        batch = self._now.batch

        def with_batch(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # the graph holds the positions
                return function(*args, **kwargs)
            outer, self._now.batch = self._now.batch, batch
            try:
                return function(*args, **kwargs)
            finally:
                self._now.batch = outer

        return with_batch

    # --- hooks ---------------------------------------------------------------------

    def _before_model(
        self, module: nn.Module, args: Any, kwargs: Any
    ) -> tuple[Any, Any] | None:
        labels = kwargs.get("labels")
        if labels is None and len(args) > 1:
            names = inspect.signature(module.forward).parameters
            labels = dict(zip(names, args, strict=False)).get("labels")
        self._now.labels = labels
        self._now.told_prompts = kwargs.get(PROMPTS)
        if self._now.told_prompts is None:
            return None
        return args, {key: kwargs[key] for key in kwargs if key != PROMPTS}

    def _before_backbone(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if getattr(module, "_is_replica", False):
            raise ValueError(
                "LoReFT does not run under torch.nn.DataParallel, which transformers' "
                "Trainer takes for several GPUs in one process; start a process for "
                "each GPU (accelerate launch, torchrun), or let Python see one of them "
                "(CUDA_VISIBLE_DEVICES=0)"
            )
        inputs = self._inputs(args, kwargs)
        labels, self._now.labels = self._now.labels, None
        most, self._now.told_prompts = self._now.told_prompts, None
        wanted = inputs.get("output_hidden_states")
        if wanted is None:
            wanted = getattr(module.config, "output_hidden_states", False)
        self._now.edited_outputs = {} if wanted else None
        batch = self._now.batch = self._read(inputs, labels, module.training)
        batch.most = most
        batch.compiled = torch.compiler.is_compiling()
        if self._now.adapter_names is not None:
            batch.adapter_rows = AdapterRows.of_batch(
                self._now.adapter_names,
                batch.shape[0],
                expands=self._now.generation is not None,
            )
        # At the start, where a device is still at work on the step before, as a rule;
        # with its first layer to compute it would soon wait for this.
        if not batch.past and fused.run_on(_tokens(inputs).device):
            self._prepare(batch)

    def _after_backbone(
        self, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        batch, self._now.batch = self._now.batch, None
        edited, self._now.edited_outputs = self._now.edited_outputs, None
        states = getattr(output, "hidden_states", None) if edited else None
        if edited and states is not None:
            output.hidden_states = tuple(edited.get(id(h), h) for h in states)
        if self._now.generation is None:  # else noted as a whole, when it has ended
            self._note_forward(self._inputs(args, kwargs), output, batch)

    def _note_forward(
        self, inputs: dict[str, Any], output: Any, batch: _Batch | None
    ) -> None:
        ids_BT, cache = inputs.get("input_ids"), cache_of(output)
        if cache is None or ids_BT is None or torch.compiler.is_compiling():
            return
        # Asking a cache takes longer than the rest of this.
        past = (batch and batch.past) or _cached(cache) - ids_BT.shape[1]
        self._conversations.note_forward(cache, past, ids_BT)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        generation = self._begin(args, kwargs)
        outer, self._now.generation = self._now.generation, generation
        try:
            output = type(self._model).generate(self._model, *args, **kwargs)
        finally:
            self._now.generation = outer
        cache = cache_of(output)
        if cache is None:
            cache = cache_of(kwargs)
        self._note_answer(generation, cache, output)
        return output

    def _begin(self, args: Any, kwargs: Any) -> Generation:
        """What ``generate`` is asked to go on with; an ill-fitting cache is cut."""
        names = ("inputs_embeds", "inputs", "input_ids")
        given = [*args[:1], *(kwargs.get(name) for name in names)]
        first = next((value for value in given if value is not None), None)
        width = 1 if first is None else first.shape[1]
        rows = self._now.adapter_names
        if rows is not None and first is not None and len(rows) != len(first):
            raise wrong_length(rows, len(first))
        ids_BP = first if first is not None and first.ndim == 2 else None
        mask, cache = kwargs.get("attention_mask"), cache_of(kwargs)
        mask_BW = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        past = _cached(cache)
        if not past:
            return Generation(width, ids_BP, mask_BW=mask_BW)
        omitted = 0 if mask_BW is None else max(mask_BW.shape[1] - width, 0)
        if omitted and ids_BP is not None:
            known = self._conversations.before(cache, omitted, ids_BP.shape[0])
            ids_BP = None if known is None else torch.cat([known.ids_BW, ids_BP], 1)
        answer_BP = None
        if ids_BP is not None:
            answer_BP = self._conversations.answers(cache, ids_BP)
        generation = Generation(
            width + omitted, ids_BP, answer_BP, True, omitted, mask_BW
        )
        keep = min((generation.cut(turns, past) for turns in self.turns), default=past)
        if keep < past:
            _cut_back(cache, past, keep, bool(omitted))
        generation.start(keep)
        return generation

    def _note_answer(self, generation: Generation, cache: Any, output: Any) -> None:
        """Remember what was answered, should the cache be gone on with."""
        sequences = getattr(output, "sequences", output)
        ids_BP, answer_BP = generation.ids_BP, generation.answer_BP
        if cache is None or ids_BP is None or sequences.shape[0] != ids_BP.shape[0]:
            return
        ids_BW = torch.cat([ids_BP[:, : generation.omitted], sequences], 1)
        answer_BW = torch.ones_like(ids_BW, dtype=torch.bool)
        answer_BW[:, : generation.width] = False if answer_BP is None else answer_BP
        self._conversations.note(cache, Tokens(ids_BW, answer_BW))

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        prepare = type(self._model).prepare_inputs_for_generation
        inputs = prepare(self._model, *args, **kwargs)
        if self._now.generation is not None:
            mask, has_cache = kwargs.get("attention_mask"), cache_of(inputs) is not None
            is_2d = isinstance(mask, Tensor) and mask.ndim == 2
            self._now.generation.prepare(
                mask if is_2d else None, _tokens(inputs), has_cache
            )
        return inputs

    def _init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Of ``generate_batch`` and servers, whose own thread would hide an error."""
        if any(layer.asks_for_prompts for layer in self.layers):
            raise _cannot_batch_continuously()
        return type(self._model).init_continuous_batching(self._model, *args, **kwargs)

    # --- reading a batch -----------------------------------------------------------

    def _inputs(self, args: Any, kwargs: Any) -> dict[str, Any]:
        return (
            dict(zip(self._parameters, args, strict=False)) | kwargs if args else kwargs
        )

    def _read(
        self, inputs: dict[str, Any], labels: Tensor | None, training: bool
    ) -> _Batch:
        ids_BT, tokens = inputs.get("input_ids"), _tokens(inputs)
        shape, device = (tokens.shape[0], tokens.shape[1]), tokens.device
        if not self._labels_mark_answers or (
            labels is not None and tuple(labels.shape) != shape
        ):
            labels = None
        cache, mask = cache_of(inputs), inputs.get("attention_mask")
        if labels is None and self._now.generation is not None:
            return self._read_step(self._now.generation, shape, device)
        past = _cached(cache)
        if past and labels is None and self.find_answers is None:
            return self._read_chunk(cache, past, ids_BT, mask, shape)
        starts = sample_starts(inputs, shape)
        pages = pages_of(inputs)

        def find(turns: Turns) -> PromptRuns | PromptSpans:
            if pages is not None:
                raise _cannot_batch_continuously()
            real_BT = real_tokens(mask, shape, device)
            if labels is not None:
                answer_BT = labels.to(device) != -100
            elif self.find_answers is not None:
                answer_BT = self.find_answers(tokens).expand(shape).to(device) != 0
            else:
                self._warn_without_labels(training)
                return turns.runs(real_BT, ids_BT, starts)
            runs = answered_prompts(turns, ids_BT, real_BT, starts, answer_BT)
            self._warn_without_prompt(runs)
            return runs

        return _Batch(shape, find, one_sample_rows=starts is None)

    def _read_step(
        self, generation: Generation, shape: tuple[int, int], device: torch.device
    ) -> _Batch:
        """A forward inside ``generate``: the prompt is what that was given."""
        if generation.gone_by:
            return _Batch(shape, _nothing, one_sample_rows=True, past=1, gone_by=True)
        rows, tokens = shape

        def find(turns: Turns) -> PromptSpans | None:
            return generation.step(turns, rows, tokens, device)

        return _Batch(shape, find, one_sample_rows=True, past=generation.past)

    def _read_chunk(
        self,
        cache: Any,
        past: int,
        ids_BT: Tensor | None,
        mask: Any,
        shape: tuple[int, int],
    ) -> _Batch:
        """A forward on a filled cache: marks tell, read with what is cached."""
        if not any(turns.generation_prompts for turns in self._turns.values()):
            return _Batch(
                shape, _nothing, one_sample_rows=True, past=past, gone_by=True
            )

        def find(turns: Turns) -> PromptSpans | None:
            if ids_BT is None or not turns.generation_prompts:
                return None
            known = self._conversations.before(cache, past, shape[0])
            if known is None:
                return None
            seen = known.followed_by(ids_BT)
            width = (shape[0], past + shape[1])
            real_BW = real_tokens(mask, width, ids_BT.device)
            runs = turns.runs(real_BW, seen.ids_BW, None, seen.answer_BW)
            return runs.spans().columns(past, width[1])

        return _Batch(shape, find, one_sample_rows=True, past=past)

    def _warn_without_labels(self, training: bool) -> None:
        if training and torch.is_grad_enabled() and self._labels_mark_answers:
            warnings.warn(
                "LoReFT: a training forward without labels takes the whole input as "
                "the prompt. If the input holds answers, pass the labels to the model "
                "(a trainer that takes them out, as label smoothing does, cannot be "
                "used with prompt positions)",
                UserWarning,
                stacklevel=2,
            )

    def _warn_without_prompt(self, runs: PromptRuns) -> None:
        """Once, on the first batch with labels: later ones must not wait for it."""
        if self._checked or torch.compiler.is_compiling():
            return
        self._checked = True
        if not runs.inside_BT.any():
            warnings.warn(
                "LoReFT: every token of the first batch is trained, so it has no "
                "prompt and nothing is edited. Set the labels of prompt tokens to "
                "-100 (train_on_inputs: false), or use positions: all",
                UserWarning,
                stacklevel=2,
            )


def _tokens(inputs: dict[str, Any]) -> Tensor:
    """A forward's tokens (B, T), or their embeddings (B, T, D)."""
    ids_BT: Tensor | None = inputs.get("input_ids")
    return inputs["inputs_embeds"] if ids_BT is None else ids_BT


def _nothing(turns: Turns) -> None:
    """Of a forward without prompts."""


def _cannot_batch_continuously() -> ValueError:
    return ValueError(
        "continuous batching (generate_batch, transformers serve) mixes pieces of "
        "prompts and of answers in a row and does not say which is which, so that "
        "LoReFT cannot know what to edit; call generate, with prompts padded on the "
        "left for several, or use an adapter with positions: all"
    )


def _cut_back(cache: Any, past: int, keep: int, new_alone: bool) -> None:
    """Drop what was cached of a prompt that ended elsewhere then."""
    remedy = "pass a fresh cache and the whole conversation"
    if new_alone:
        raise ValueError(
            f"past_key_values: the cache ends within a prompt, {past - keep} tokens of "
            "it are cached and the rest is new, so that its first and last tokens "
            f"cannot be told; {remedy}"
        )
    try:
        cache.crop(keep - past)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            "past_key_values: the cache ends within a prompt and was edited for "
            f"another end of it, and a {type(cache).__name__} cannot be cut back "
            f"({error}); {remedy}"
        ) from error


def _indices(
    batch: _Batch, positions: Positions, turns: Turns, tied: bool, adapter: str | None
) -> tuple[Tensor, ...] | None:
    runs = batch.runs(turns)
    if isinstance(runs, PromptRuns) and adapter is None:
        sides = _reserved(batch, runs, positions)
        if sides:
            return (torch.cat(sides),) if tied and len(sides) > 1 else (*sides,)
    spans = batch.prompts(turns)
    if spans is None:
        return None
    prefix_BT, suffix_BT = spans.edited(positions)
    rows, tokens = batch.shape
    if adapter is not None and batch.adapter_rows is not None:
        own_B1 = batch.adapter_rows.mask(adapter, prefix_BT.device)
        prefix_BT, suffix_BT = prefix_BT & own_B1, suffix_BT & own_B1
        rows = batch.adapter_rows.count(adapter)
    device = prefix_BT.device.type

    def indices(mask_BT: Tensor, per_prompt: int) -> Tensor:
        slots = _slots(batch, turns, rows, per_prompt, device)
        return flat_indices(mask_BT, slots)

    if positions.two_sided and not tied:
        return indices(prefix_BT, positions.first), indices(suffix_BT, positions.last)
    return (indices(prefix_BT | suffix_BT, positions.first + positions.last),)


def _reserved(batch: _Batch, runs: PromptRuns, positions: Positions) -> list[Tensor]:
    """Slots for every position of the prompts that were counted before; none where
    they are better made from masks: where they may be counted, in a graph, whose
    operations are few kernels, and where they would be more than tokens."""
    most, compiling = batch.most, torch.compiler.is_compiling()
    free = _counting_is_free(runs.inside_BT.device.type)
    if most is None or not runs.unbroken or free or compiling:
        return []
    rows, tokens = batch.shape
    if most * (positions.first + positions.last) > rows * tokens:
        return []
    return runs.reserved_indices(positions, most)


def _counting_is_free(device: str) -> bool:
    """Whether the host need not wait for what edits are counted by."""
    return device == "cpu" and not torch.compiler.is_compiling()


def _slots(
    batch: _Batch, turns: Turns, rows: int, per_prompt: int, device: str
) -> int | None:
    """How many slots to reserve for edits; None to count them.

    Counting is free on a CPU, and makes the host wait for an accelerator, once a
    forward; a graph cannot wait. It is not needed where the batch's prompts were
    counted before, or a row has one of them.
    """
    if _counting_is_free(device):
        return None
    everything = rows * batch.shape[1]
    if batch.most is not None:
        return min(batch.most * per_prompt, everything)
    if batch.one_sample_rows and not turns.every:
        return min(rows * per_prompt, everything)
    return everything if torch.compiler.is_compiling() else None


def _cached(cache: Any) -> int:
    """Columns in a cache; legacy tuples of key and value are not used any more."""
    return 0 if cache is None else int(cache.get_seq_length())


def answered_prompts(
    turns: Turns,
    ids_BT: Tensor | None,
    real_BT: Tensor,
    starts_BT: Tensor | None,
    answer_BT: Tensor,
) -> PromptRuns:
    """The prompts of samples whose answers are known, packed or not."""
    if starts_BT is not None:
        # The padded end of a packed row looks like one more sample.
        real_BT = real_BT & any_in_sample(answer_BT, starts_BT)
    return turns.runs(real_BT, ids_BT, starts_BT, answer_BT)


def sample_starts(inputs: dict[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """True where ``position_ids`` begin anew: the samples of packed rows."""
    position_ids = inputs.get("position_ids")
    if position_ids is None:
        return None
    if position_ids.ndim == 3:  # multimodal rotary embeddings: (axes, B, T)
        # An image at the start is at 0 in time as a whole.
        return (position_ids == 0).all(0).expand(shape)
    return (position_ids == 0).expand(shape)


def real_tokens(mask: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    """True where there is a token: a 2-D mask of 0 and 1, or of segment numbers."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == shape:
        return mask.to(device) != 0
    got = (
        f"a tensor of shape {tuple(mask.shape)}"
        if isinstance(mask, Tensor)
        else f"a {type(mask).__name__}"
    )
    raise ValueError(
        f"LoReFT reads prompts from the 2-D attention mask {shape}, and got {got}; "
        "pass the mask as the tokenizer makes it, or use positions: all"
    )
