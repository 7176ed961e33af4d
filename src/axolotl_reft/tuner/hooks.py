"""Hooks on the base model that find out, once a forward, which tokens are edited.

They are the model's, since inner steps of ``generate``, and models from
``AutoModel.from_pretrained(adapter)``, pass over PEFT's tuner object.

Where an adapter knows the marks of a chat template (``turn_markers``) and a sample has
them, the marks tell its prompts, in training and at inference; but a trained token is
never prompt. Elsewhere,

- in a forward with labels, the prompt is everything before the first trained token, and
  with ``turns: every`` the tokens between trained ones as well;
- where a trainer that keeps the labels to itself has set ``find_answers``, the same of
  its answer tokens;
- in a step of ``generate``, the prompt is its input, cached or not, except what it had
  answered on the same cache before;
- in any other forward without a cache, the whole sample;
- with a filled cache, a token alone is an answer's (``on_cache.py``).

Shapes: B batch, T tokens of this forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from axolotl_reft.prompts.cached import CacheRecord
from axolotl_reft.prompts.generation import Generation
from axolotl_reft.tuner import prompt_sources
from axolotl_reft.tuner.cached_edits import columns_in
from axolotl_reft.tuner.checkpointing import refuse_reentrant_checkpointing
from axolotl_reft.tuner.compat import cache_of, forward_parameters, pages_of
from axolotl_reft.tuner.context import (
    POSITIONS,
    FindSpans,
    ForwardContext,
    ModelState,
    strengths_by_row,
)
from axolotl_reft.tuner.executor import prepare_edits
from axolotl_reft.tuner.frozen_prompt import FrozenPrompt
from axolotl_reft.tuner.generating import GenerateHooks
from axolotl_reft.tuner.layout import layout_of
from axolotl_reft.tuner.on_cache import MakeRecord, new_record, read_on_cache
from axolotl_reft.tuner.packing import warn_of_packed_samples, what_joins_samples

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Inputs = Mapping[str, Any]


class ModelHooks:
    """Makes the :class:`ForwardContext` of every forward of a base model, with adapters
    whose parameters' names hold a prefix."""

    def __init__(self, model: PreTrainedModel, layers: str, prefix: str) -> None:
        refuse_reentrant_checkpointing(model)
        self.state = ModelState(layout_of(model.config.get_text_config()))
        self._has_compiled = False
        self._has_checked_first_batch = False
        self._joins_samples = what_joins_samples(model)
        # A classifier's labels are not tokens of an answer.
        self._labels_mark_answers = model.can_generate()
        self.model, self.layers, self.prefix = model, layers, prefix
        self.frozen_prompt: FrozenPrompt | None = None
        self.frozen_prompt_is_chosen = False  # by the user
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        ]
        self.backbones = backbones(model, layers)
        for backbone in self.backbones:
            names = forward_parameters(backbone)
            before = partial(self._before_backbone, names)
            self._handles += [
                backbone.register_forward_pre_hook(before, with_kwargs=True),
                backbone.register_forward_hook(self._after_backbone),
            ]
        head = model.get_output_embeddings() if model.can_generate() else None
        if isinstance(head, nn.Linear):
            self._handles.append(head.register_forward_pre_hook(copy_slice))
        model.disable_input_require_grads()
        self._replaced: list[tuple[nn.Module, str]] = []
        self._replace(model, "enable_input_require_grads", self._enable_input_grads)
        self._replace(
            model, "gradient_checkpointing_enable", self._enable_checkpointing
        )
        # Some architectures' generate calls that of a model within.
        for module in dict.fromkeys([model, *self.backbones]):
            if module.can_generate():
                hooks = GenerateHooks(module, self.state)
                for name, method in hooks.methods().items():
                    if hasattr(module, name):
                        self._replace(module, name, method)

    def _replace(
        self, module: nn.Module, name: str, method: Callable[..., Any]
    ) -> None:
        # Patch: generate tells its steps nowhere else; continuous batching is refused
        # before its own thread would hide the error; whoever checkpoints asks for input
        # gradients. Generate reads the signature of prepare_inputs_for_generation; a
        # copy of annotations could not be pickled.
        names = "__module__", "__name__", "__qualname__", "__doc__"
        replaced = getattr(module, name)
        module.__dict__[name] = update_wrapper(
            partial(method), replaced, assigned=names
        )
        self._replaced.append((module, name))

    def use_frozen_prompt(self, frozen_prompt: FrozenPrompt | None) -> None:
        """Compute the backbone's forwards by this, or as they were."""
        if self.frozen_prompt is not None:
            self.frozen_prompt.detach()
        self.frozen_prompt = frozen_prompt
        if frozen_prompt is not None:
            frozen_prompt.attach()

    def detach(self) -> None:
        """Leave the model as it was."""
        self.use_frozen_prompt(None)
        for handle in self._handles:
            handle.remove()
        for module, name in self._replaced:
            module.__dict__.pop(name, None)

    def _enable_input_grads(self) -> None:
        """Make the embeddings' output require a gradient where other parameters than
        the adapter's are trained.

        Transformers, PEFT and axolotl ask for it wherever an adapter meets
        checkpointing, and backward then runs through every layer. Reentrant
        checkpointing needs it for trained weights inside of layers; LoReFT's see to it
        themselves (``replay.py``).
        """
        named = self.model.named_parameters()
        if any(p.requires_grad and self.prefix not in name for name, p in named):
            type(self.model).enable_input_require_grads(self.model)

    def _enable_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        type(self.model).gradient_checkpointing_enable(self.model, *args, **kwargs)
        refuse_reentrant_checkpointing(self.model)

    # --- a forward -----------------------------------------------------------------

    def _before_model(
        self, module: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        """Take what the backbone is not given: the labels, a collator's indices, and of
        some models the mask."""
        inputs: Inputs = kwargs
        if len(args) > 1:
            names = forward_parameters(module)
            inputs = dict(zip(names, args, strict=False)) | kwargs
        thread = self.state.thread
        thread.context = None  # of a forward that an exception ended
        if self._joins_samples and kwargs.get("position_ids") is not None:
            if not (thread.generation or torch.compiler.is_compiling()):
                # Once: later batches must not wait for the answer.
                warn_of_packed_samples(self._joins_samples, kwargs)
                self._joins_samples = ""
        thread.labels, thread.given = inputs.get("labels"), kwargs.get(POSITIONS)
        thread.mask = inputs.get("attention_mask")
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
        if thread.mask is not None and inputs.get("attention_mask") is None:
            inputs = {**inputs, "attention_mask": thread.mask}
        labels, given, step = thread.labels, thread.given, thread.step
        thread.labels = thread.given = thread.mask = thread.step = None
        context = self._context(inputs, labels, step, module.training)
        asked = inputs.get("output_hidden_states")
        default = getattr(module.config, "output_hidden_states", False)
        if default if asked is None else asked:
            context.edited_outputs = {}
        if thread.row_adapters is not None:
            adapters = self.state.active_adapters(context.shape[0])
            device = prompt_sources.tokens_of(inputs).device
            context.row_adapters = list(adapters.names)
            context.strengths = strengths_by_row(adapters, device)
        # Rows that a trainer cut out of the collator's batch are found anew.
        elif given is not None and tuple(given["shape"]) == context.shape:
            context.given, context.on_host = given["indices"], given.get("on_host")
        thread.context, thread.backbone = context, module
        if not context.past:
            # Now, while the device is still at work on the step before.
            context.prepared = prepare_edits(self.state)

    def _after_backbone(self, module: nn.Module, args: Args, output: Any) -> None:
        thread = self.state.thread
        if thread.backbone is not module:
            return
        context, thread.context, thread.backbone = thread.context, None, None
        assert context is not None, "_before_backbone comes first"
        compiling = torch.compiler.is_compiling()
        was_looked_at = self._has_checked_first_batch or context.past or compiling
        if context.find_answers and not was_looked_at:
            # Once: later batches must not wait for the answer.
            self._has_checked_first_batch = context.warn_without_prompt()
        edited, states = context.edited_outputs, getattr(output, "hidden_states", None)
        if edited and states is not None:
            output.hidden_states = tuple(edited.get(id(h), (h, h))[1] for h in states)
        if compiling:
            self._has_compiled = True
        # What generate puts into a cache is noted as a whole, when it has ended.
        elif not context.is_prepared and (cache := cache_of(output)) is not None:
            make_record = context.make_record
            CacheRecord.put(cache, make_record() if make_record else None)

    def _context(
        self,
        inputs: Inputs,
        labels: Tensor | None,
        step: Generation | None,
        training: bool,
    ) -> ForwardContext:
        """Tell where this forward's prompts are read from; ``step`` is None where
        ``generate`` did not prepare it."""
        state = self.state
        tokens, past, packed = prompt_sources.tokens_of(inputs), 0, False
        shape = rows, width = tokens.shape[0], tokens.shape[1]
        find_spans: FindSpans | None = None
        find_answers: Callable[[], Tensor] | None = None
        make_record: MakeRecord | None = None
        checks = False
        if self._labels_mark_answers and labels is not None and labels.shape == shape:
            find_answers = partial(torch.ne, labels, -100)
            # An accelerator is waited for once; its collators look at each batch.
            waits = labels.device.type != "cpu" and self._has_checked_first_batch
            checks = not (waits or torch.compiler.is_compiling())
        elif step is None and state.find_answers is not None:
            find_answers = partial(state.find_answers, tokens)
        if step is not None:
            # A constant in decode steps: a graph would be specialised on each past.
            past = 1 if step.is_decode_step else step.past
            if not step.is_decode_step:
                find_spans = partial(
                    step.step, rows=rows, tokens=width, device=tokens.device
                )
        elif past := columns_in(cache_of(inputs)):
            find_spans, make_record = read_on_cache(
                state,
                *(inputs, tokens, past, find_answers, checks),
                self._has_compiled,
            )
        elif pages_of(inputs) is not None:
            find_spans = prompt_sources.refuse_continuous_batching
        else:
            packed = inputs.get("position_ids") is not None
            trains = training and torch.is_grad_enabled() and self._labels_mark_answers
            find_spans = partial(
                prompt_sources.batch_spans,
                *(inputs, tokens, find_answers, trains, state.trainer, checks),
            )
            make_record = partial(new_record, state, inputs, tokens, find_answers)
        return ForwardContext(
            shape,
            state.adapters,
            find_spans,
            past,
            packed,
            find_answers,
            is_prepared=step is not None,
            make_record=make_record,
            strengths=state.strengths,
        )


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


def copy_slice(head: nn.Module, args: Args) -> Args | None:
    """Copy the last hidden states that ``generate`` slices from those of its prompt.

    On a CPU, torch multiplies a slice by a frozen weight in one product for each row,
    for which it copies the weight; ``contiguous`` returns the slice of one row as it
    is.
    """
    if not args or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    h = args[0]
    # A row's stride tells a slice of a longer row, also where there is one row.
    if h.device.type != "cpu" or h.ndim != 3 or h.stride(0) == h.shape[1:].numel():
        return None
    return h.clone(memory_format=torch.contiguous_format), *args[1:]


def _named(names: list[str], args: Args, kwargs: Kwargs) -> Inputs:
    """Return a forward's inputs by the names of its parameters."""
    return dict(zip(names, args, strict=False)) | kwargs if args else kwargs
