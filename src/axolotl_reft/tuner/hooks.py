"""Hooks on the base model that find out, once a forward, which tokens are edited.

They are the model's, since inner steps of ``generate``, and models from
``AutoModel.from_pretrained(adapter)``, pass over PEFT's tuner object.

Where an adapter knows the marks of a chat template (``turn_markers``) and a sample has
them, the marks tell its prompts, in training and at inference. Elsewhere,

- in a forward with labels, the prompt is everything before the first trained token, and
  with ``turns: every`` the tokens between trained ones as well;
- where a trainer that keeps the labels to itself has set ``find_answers``, the same of
  its answer tokens;
- while ``generate`` runs, the prompt is its input, cached or not, at every step, except
  what it had answered on the same cache before;
- in any other forward without a cache, the whole sample;
- with a filled cache, nothing.

Shapes: B batch, T tokens of this forward, P columns handed to ``generate``, W columns
seen so far (the cache's and T).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from axolotl_reft.prompts.generation import Conversations, Generation, Tokens, crop
from axolotl_reft.tuner import prompt_sources
from axolotl_reft.tuner.compat import cache_of, pages_of
from axolotl_reft.tuner.context import (
    POSITIONS,
    FindSpans,
    ForwardContext,
    ModelState,
    prompt_turns,
    repeat_names,
)
from axolotl_reft.tuner.executor import prepare_edits
from axolotl_reft.tuner.layout import layout_of

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Inputs = Mapping[str, Any]


class ModelHooks:
    """Makes the :class:`ForwardContext` of every forward of a base model, with adapters
    whose parameters' names hold a prefix."""

    def __init__(self, model: PreTrainedModel, layers: str, prefix: str) -> None:
        self.state = ModelState(layout_of(model.config.get_text_config()))
        self._conversations = Conversations()
        self._has_checked_first_batch = False
        # A classifier's labels are not tokens of an answer.
        self._labels_mark_answers = model.can_generate()
        self._model, self._prefix = model, prefix
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        ]
        self.backbones = backbones(model, layers)
        for backbone in self.backbones:
            names = list(inspect.signature(backbone.forward).parameters)
            before, after = self._before_backbone, self._after_backbone
            self._handles += [
                backbone.register_forward_pre_hook(
                    partial(before, names), with_kwargs=True
                ),
                backbone.register_forward_hook(partial(after, names), with_kwargs=True),
            ]
        model.disable_input_require_grads()
        overrides: list[tuple[PreTrainedModel, str, Callable[..., Any]]] = [
            (model, "enable_input_require_grads", self._enable_input_grads),
            (model, "init_continuous_batching", self._init_continuous_batching),
        ]
        # Some architectures' generate calls that of a model within.
        for module in dict.fromkeys([model, *self.backbones]):
            overrides += [
                (module, "generate", partial(self._generate, module)),
                (
                    module,
                    "prepare_inputs_for_generation",
                    partial(self._prepare_inputs, module),
                ),
            ]
        # Patch: generate tells its steps nowhere else; continuous batching is refused
        # before its own thread would hide the error; whoever checkpoints asks for input
        # gradients. Generate reads the signature of prepare_inputs_for_generation.
        self._overridden: list[tuple[PreTrainedModel, str]] = []
        for module, name, override in overrides:
            if name == "enable_input_require_grads" or module.can_generate():
                replaced = getattr(module, name)
                module.__dict__[name] = update_wrapper(partial(override), replaced)
                self._overridden.append((module, name))

    def detach(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for module, name in self._overridden:
            module.__dict__.pop(name, None)

    def _enable_input_grads(self) -> None:
        """Make the embeddings' output require a gradient where other parameters than
        the adapter's are trained.

        Transformers, PEFT and axolotl ask for it wherever an adapter meets
        checkpointing, and backward then runs through every layer. Reentrant
        checkpointing needs it for trained weights inside of layers; LoReFT's see to it
        themselves (``replay.py``).
        """
        named = self._model.named_parameters()
        if any(p.requires_grad and self._prefix not in name for name, p in named):
            type(self._model).enable_input_require_grads(self._model)

    # --- a forward -----------------------------------------------------------------

    def _before_model(
        self, module: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        """Take what the backbone is not given: the labels, and a collator's indices."""
        labels = kwargs.get("labels")
        if labels is None and len(args) > 1:
            names = inspect.signature(module.forward).parameters
            labels = dict(zip(names, args, strict=False)).get("labels")
        thread = self.state.thread
        thread.context = None  # of a forward that an exception ended
        thread.labels, thread.given = labels, kwargs.get(POSITIONS)
        if thread.given is None:
            return None
        return args, {key: kwargs[key] for key in kwargs if key != POSITIONS}

    def _before_backbone(
        self, names: list[str], module: Any, args: Args, kwargs: Kwargs
    ) -> None:
        thread = self.state.thread
        is_within = thread.context is not None and thread.backbone is not module
        if is_within and module is not self.backbones[0]:
            return  # the context is that of the whole
        if getattr(module, "_is_replica", False):
            raise ValueError(
                "LoReFT does not run under torch.nn.DataParallel, which transformers' "
                "Trainer uses for several GPUs; start a process for each (accelerate "
                "launch, torchrun), or show Python one of them (CUDA_VISIBLE_DEVICES=0)"
            )
        inputs = _named(names, args, kwargs)
        labels, given = thread.labels, thread.given
        thread.labels = thread.given = None
        context = self._context(inputs, labels, module.training)
        asked = inputs.get("output_hidden_states")
        default = getattr(module.config, "output_hidden_states", False)
        if default if asked is None else asked:
            context.edited_outputs = {}
        if thread.adapter_names is not None:
            expands = thread.generation is not None
            rows = repeat_names(thread.adapter_names, context.shape[0], expands)
            context.row_adapters = rows
        # Rows that a trainer cut out of the collator's batch are found anew.
        elif given is not None and tuple(given["shape"]) == context.shape:
            context.given = given["indices"]
        thread.context, thread.backbone = context, module
        if not context.past:
            # Now, while the device is still at work on the step before.
            context.prepared = prepare_edits(self.state)

    def _after_backbone(
        self,
        names: list[str],
        module: nn.Module,
        args: Args,
        kwargs: Kwargs,
        output: Any,
    ) -> None:
        thread = self.state.thread
        if thread.backbone is not module:
            return
        context, thread.context, thread.backbone = thread.context, None, None
        assert context is not None, "_before_backbone comes first"
        compiling = torch.compiler.is_compiling()
        if context.find_answers and not (self._has_checked_first_batch or compiling):
            # Once: later batches must not wait for the answer.
            self._has_checked_first_batch = context.warn_without_prompt()
        edited, states = context.edited_outputs, getattr(output, "hidden_states", None)
        if edited and states is not None:
            output.hidden_states = tuple(edited.get(id(h), (h, h))[1] for h in states)
        # What generate puts into a cache is noted as a whole, when it has ended.
        if thread.generation is not None or compiling:
            return
        ids_BT = _named(names, args, kwargs).get("input_ids")
        cache = cache_of(output)
        if cache is not None and ids_BT is not None:
            # Asking a cache takes longer than the rest of this.
            past = context.past or _cached(cache) - ids_BT.shape[1]
            self._conversations.note_forward(cache, past, ids_BT)

    def _context(
        self, inputs: Inputs, labels: Tensor | None, training: bool
    ) -> ForwardContext:
        """Tell where this forward's prompts are read from."""
        state, generation = self.state, self.state.thread.generation
        tokens, past, packed = _tokens(inputs), 0, False
        shape = rows, width = tokens.shape[0], tokens.shape[1]
        find_spans: FindSpans | None = None
        find_answers: Callable[[], Tensor] | None = None
        if self._labels_mark_answers and labels is not None and labels.shape == shape:
            find_answers = partial(torch.ne, labels, -100)
        elif generation is None and state.find_answers is not None:
            find_answers = partial(state.find_answers, tokens)
        if find_answers is None and generation is not None:
            # A constant in decode steps: a graph would be specialised on each past.
            past = 1 if generation.is_decode_step else generation.past
            if not generation.is_decode_step:
                find_spans = partial(
                    generation.step, rows=rows, tokens=width, device=tokens.device
                )
        elif find_answers is None and (past := _cached(cache_of(inputs))):
            find_spans = self._in_cache(inputs, past, rows)
        elif pages_of(inputs) is not None:
            find_spans = prompt_sources.refuse_continuous_batching
        else:
            packed = inputs.get("position_ids") is not None
            trains = training and torch.is_grad_enabled() and self._labels_mark_answers
            find_spans = partial(
                prompt_sources.batch_spans, inputs, tokens, find_answers, trains
            )
        return ForwardContext(
            shape, state.adapters, find_spans, past, packed, find_answers
        )

    def _in_cache(self, inputs: Inputs, past: int, rows: int) -> FindSpans | None:
        """Return what finds prompts on a filled cache, outside ``generate``."""
        ids_BT, turns = inputs.get("input_ids"), prompt_turns(self.state.adapters)
        if ids_BT is None or not any(turn.generation_prompts for turn in turns):
            return None
        known = self._conversations.before(cache_of(inputs), past, rows)
        if known is None:
            return None
        mask = inputs.get("attention_mask")
        return partial(prompt_sources.cached_spans, known, ids_BT, mask)

    # --- generate ------------------------------------------------------------------

    def _generate(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        thread, generation = self.state.thread, self._begin(args, kwargs)
        outer, thread.generation = thread.generation, generation
        try:
            output = type(model).generate(model, *args, **kwargs)
        finally:
            thread.generation = outer
        sequences, ids_BP = getattr(output, "sequences", output), generation.ids_BP
        cache = cache_of(output) or cache_of(kwargs)
        if cache is not None and ids_BP is not None and len(sequences) == len(ids_BP):
            # Should the cache be gone on with, these are answers of the model's.
            ids_BW = torch.cat([ids_BP[:, : generation.omitted], sequences], 1)
            answer_BW, known_BP = torch.ones_like(ids_BW).bool(), generation.answer_BP
            answer_BW[:, : generation.width] = False if known_BP is None else known_BP
            self._conversations.note(cache, Tokens(ids_BW, answer_BW))
        return output

    def _begin(self, args: Args, kwargs: Kwargs) -> Generation:
        """Read what ``generate`` is asked to go on with; cut an ill-fitting cache."""
        names = ("inputs_embeds", "inputs", "input_ids")
        given = [*args[:1], *(kwargs.get(name) for name in names)]
        first = next((value for value in given if value is not None), None)
        width = 1 if first is None else first.shape[1]
        names_of_rows = self.state.thread.adapter_names
        if names_of_rows is not None and first is not None:
            repeat_names(names_of_rows, len(first), expands=False)  # for its check
        ids_BP = first if first is not None and first.ndim == 2 else None
        mask_BW, cache = _mask_2d(kwargs), cache_of(kwargs)
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
        width += omitted
        generation = Generation(width, ids_BP, answer_BP, True, omitted, mask_BW)
        turns = prompt_turns(self.state.adapters)
        keep = min((generation.reusable(turn, past) for turn in turns), default=past)
        if keep < past:
            crop(cache, past, keep, bool(omitted))
        generation.filled = keep
        return generation

    def _prepare_inputs(
        self, model: PreTrainedModel, *args: Any, **kwargs: Any
    ) -> Kwargs:
        prepare = type(model).prepare_inputs_for_generation
        inputs: Kwargs = prepare(model, *args, **kwargs)
        generation = self.state.thread.generation
        if generation is not None:
            tokens, has_cache = _tokens(inputs).shape[1], cache_of(inputs) is not None
            generation.prepare(_mask_2d(kwargs), tokens, has_cache)
        return inputs

    def _init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        if any(layer.asks_for_prompts for layer in self.state.layers):
            prompt_sources.refuse_continuous_batching()
        return type(self._model).init_continuous_batching(self._model, *args, **kwargs)


def backbones(model: PreTrainedModel, layers: str) -> list[PreTrainedModel]:
    """Return the models within a model on the path to its list of layers, outermost
    first: heads of some architectures call past the base model."""
    base = model.base_model
    names, module = layers.split("."), model
    found = [base] if base is model else []
    for name in names:
        module = module.get_submodule(name)
        if isinstance(module, PreTrainedModel) and (found or module is base):
            found.append(module)
    return found


def _named(names: list[str], args: Args, kwargs: Kwargs) -> Inputs:
    """Return a forward's inputs by the names of its parameters."""
    return dict(zip(names, args, strict=False)) | kwargs if args else kwargs


def _tokens(inputs: Inputs) -> Tensor:
    """Return a forward's tokens (B, T), or their embeddings (B, T, D)."""
    ids_BT: Tensor | None = inputs.get("input_ids")
    return inputs["inputs_embeds"] if ids_BT is None else ids_BT


def _mask_2d(kwargs: Inputs) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _cached(cache: Cache | None) -> int:
    return 0 if cache is None else int(cache.get_seq_length())
