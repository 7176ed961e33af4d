"""What a forward's own inputs say about the prompts in it.

One tracker a model, shared by all its edited layers. It hangs on the model by public
hooks, so that it also works where PEFT's tuner object is passed over: inner steps of
``generate``, and models from ``AutoModel.from_pretrained(adapter)``.

Shapes: B batch, T tokens of this forward, W columns seen so far (the cache's and T).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from axolotl_reft.positions import Positions, PromptSpans, flat_indices, prompt_spans


@dataclass
class _Generation:
    """What is remembered while ``generate`` runs.

    Attributes:
        prompt_width: columns of the prompts; None once known to continue a cached
            conversation, whose prompt was edited in its first turn.
        mask_BW: the 2-D attention mask of the step under way.
        started: a forward has been seen.
    """

    prompt_width: int | None
    mask_BW: Tensor | None = None
    started: bool = False


@dataclass
class _Batch:
    """The forward under way: its spans and their indices, made when asked for."""

    shape: tuple[int, int]
    make_spans: Callable[[], PromptSpans | None]
    one_sample_rows: bool
    indices: dict[tuple[Positions, bool], tuple[Tensor, ...] | None] = field(
        default_factory=dict
    )
    _spans: PromptSpans | None = None
    _made: bool = False

    def spans(self) -> PromptSpans | None:
        if not self._made:
            self._spans, self._made = self.make_spans(), True
        return self._spans


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

    The prompt of a sample is

    - in a forward with labels, everything before its first trained token;
    - where a trainer that keeps the labels to itself has set ``find_answers``,
      everything before its first answer token;
    - while ``generate`` runs, what was handed to it, cached or not, at every step;
    - in any other forward without a cache, the whole sample;
    - with a filled cache, nothing: the prompt has gone by.

    Attributes:
        find_answers: for a trainer that gives the model no labels: the ids (B, T) of a
            forward to a mask of its answer tokens, (B, T) or (1, T); raises for ids it
            does not know. Asked only where something of the forward is edited.
    """

    find_answers: Callable[[Tensor], Tensor] | None = None

    def __init__(self, model: PreTrainedModel, backbone: nn.Module) -> None:
        self._labels: Tensor | None = None
        self._generation: _Generation | None = None
        self._batch: _Batch | None = None
        self._edited_outputs: dict[int, Tensor] | None = None
        self._checked = False
        can_generate = getattr(model, "can_generate", None)
        # A classifier's labels are not tokens of an answer.
        self._labels_mark_answers = bool(can_generate and can_generate())
        self._model = model
        self._parameters = list(inspect.signature(backbone.forward).parameters)
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            backbone.register_forward_pre_hook(self._before_backbone, with_kwargs=True),
            backbone.register_forward_hook(self._after_backbone),
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
        return {
            "generate": self._generate,
            "prepare_inputs_for_generation": self._prepare_inputs,
        }

    # --- what layers ask -----------------------------------------------------------

    def indices(self, positions: Positions, tied: bool) -> tuple[Tensor, ...] | None:
        """Flat indices (N,) into B·T of what each intervention of a layer edits.

        Returns:
            One tensor, or two for untied prefix and suffix; None when this forward has
            no prompt in it.

        Raises:
            RuntimeError: the layer was called outside a forward of the model.
        """
        batch = self._batch
        if batch is None:
            raise RuntimeError(
                "a LoReFT layer was called outside a forward of its model, so it "
                "cannot know the prompt; call the model instead of its layers"
            )
        key = (positions, tied)
        if key not in batch.indices:
            batch.indices[key] = _indices(batch, positions, tied)
        return batch.indices[key]

    def record(self, before: Tensor, after: Tensor) -> None:
        """Note a layer's output before and after its edit, where hidden states are
        asked for: transformers records them inside the wrapper, unedited."""
        if self._edited_outputs is not None:
            self._edited_outputs[id(before)] = after

    def replayable(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which sees the batch of now whenever it runs again."""
        batch = self._batch

        def with_batch(*args: Any, **kwargs: Any) -> Any:
            outer, self._batch = self._batch, batch
            try:
                return function(*args, **kwargs)
            finally:
                self._batch = outer

        return with_batch

    # --- hooks ---------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        labels = kwargs.get("labels")
        if labels is None and len(args) > 1:
            names = inspect.signature(module.forward).parameters
            labels = dict(zip(names, args, strict=False)).get("labels")
        self._labels = labels

    def _before_backbone(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = dict(zip(self._parameters, args, strict=False)) | kwargs
        labels, self._labels = self._labels, None
        wanted = inputs.get("output_hidden_states")
        if wanted is None:
            wanted = getattr(module.config, "output_hidden_states", False)
        self._edited_outputs = {} if wanted else None
        self._batch = self._read(inputs, labels, module.training)

    def _after_backbone(self, module: nn.Module, args: Any, output: Any) -> None:
        self._batch = None
        edited, self._edited_outputs = self._edited_outputs, None
        states = getattr(output, "hidden_states", None)
        if edited and states is not None:
            output.hidden_states = tuple(edited.get(id(h), h) for h in states)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        first = next(
            (
                value
                for value in (
                    *args[:1],
                    kwargs.get("inputs_embeds"),
                    kwargs.get("inputs"),
                    kwargs.get("input_ids"),
                )
                if value is not None
            ),
            None,
        )
        width = 1 if first is None else first.shape[1]
        outer, self._generation = self._generation, _Generation(width)
        try:
            return type(self._model).generate(self._model, *args, **kwargs)
        finally:
            self._generation = outer

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        if self._generation is not None:
            mask = kwargs.get("attention_mask")
            is_2d = isinstance(mask, Tensor) and mask.ndim == 2
            self._generation.mask_BW = mask if is_2d else None
        prepare = type(self._model).prepare_inputs_for_generation
        return prepare(self._model, *args, **kwargs)

    # --- reading a batch -----------------------------------------------------------

    def _read(
        self, inputs: dict[str, Any], labels: Tensor | None, training: bool
    ) -> _Batch:
        tokens = inputs.get("input_ids")
        if tokens is None:
            tokens = inputs["inputs_embeds"]
        shape = (tokens.shape[0], tokens.shape[1])
        if not self._labels_mark_answers or (
            labels is not None and tuple(labels.shape) != shape
        ):
            labels = None
        generation = self._generation
        if generation is not None and labels is None:
            return self._read_step(generation, inputs, shape, tokens.device)
        past = _cached(inputs.get("past_key_values"))
        mask, starts = inputs.get("attention_mask"), _sample_starts(inputs, shape)

        def make_spans() -> PromptSpans | None:
            if labels is not None:
                answer_BT = labels != -100
            elif self.find_answers is not None:
                answer_BT = self.find_answers(tokens).expand(shape)
            elif past:
                return None
            else:
                self._warn_without_labels(training)
                return prompt_spans(_real_tokens(mask, shape, tokens.device), starts)
            real_BT = _real_tokens(mask, shape, tokens.device)
            spans = prompt_spans(real_BT, starts, answer_BT.to(tokens.device) != 0)
            self._warn_without_prompt(spans)
            return spans

        return _Batch(shape, make_spans, one_sample_rows=starts is None)

    def _read_step(
        self,
        generation: _Generation,
        inputs: dict[str, Any],
        shape: tuple[int, int],
        device: torch.device,
    ) -> _Batch:
        """A forward inside ``generate``: the prompt is what that was given."""
        tokens = shape[1]
        if generation.mask_BW is not None:
            width = generation.mask_BW.shape[1]
        else:
            width = _cached(inputs.get("past_key_values")) + tokens
        if not generation.started:
            generation.started = True
            if width > tokens:
                generation.prompt_width = None
        prompt = generation.prompt_width
        mask = generation.mask_BW

        def make_spans() -> PromptSpans | None:
            if prompt is None or width - tokens >= prompt:
                return None
            real_BW = _real_tokens(mask, (shape[0], width), device)
            answer_W = torch.arange(width, device=device) >= prompt
            spans = prompt_spans(
                real_BW,
                answer_BT=answer_W.expand_as(real_BW),
                pending=max(prompt - width, 0),
            )
            return spans.tail(tokens)

        return _Batch(shape, make_spans, one_sample_rows=True)

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

    def _warn_without_prompt(self, spans: PromptSpans) -> None:
        """Once, on the first batch with labels: later ones must not wait for it."""
        if self._checked or torch.compiler.is_compiling():
            return
        self._checked = True
        if not spans.inside_BT.any():
            warnings.warn(
                "LoReFT: every token of the first batch is trained, so it has no "
                "prompt and nothing is edited. Set the labels of prompt tokens to "
                "-100 (train_on_inputs: false), or use positions: all",
                UserWarning,
                stacklevel=2,
            )


def _indices(
    batch: _Batch, positions: Positions, tied: bool
) -> tuple[Tensor, ...] | None:
    spans = batch.spans()
    if spans is None:
        return None
    prefix_BT, suffix_BT = spans.edited(positions)
    rows, tokens = batch.shape
    # Counting is free on a CPU; elsewhere the host would wait, so reserve the most
    # there can be: a packed row may be all prompts.
    count_freely = prefix_BT.device.type == "cpu" and not torch.compiler.is_compiling()

    def indices(mask_BT: Tensor, per_row: int) -> Tensor:
        most = min(per_row, tokens) if batch.one_sample_rows else tokens
        return flat_indices(mask_BT, None if count_freely else rows * most)

    if positions.two_sided and not tied:
        return indices(prefix_BT, positions.first), indices(suffix_BT, positions.last)
    return (indices(prefix_BT | suffix_BT, positions.first + positions.last),)


def _cached(cache: Any) -> int:
    """Columns in a cache; legacy tuples of key and value are not used any more."""
    return 0 if cache is None else int(cache.get_seq_length())


def _sample_starts(inputs: dict[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """True where ``position_ids`` begin anew: the samples of packed rows."""
    position_ids = inputs.get("position_ids")
    if position_ids is None:
        return None
    if position_ids.ndim == 3:  # multimodal rotary embeddings: (axes, B, T)
        position_ids = position_ids[0]
    return (position_ids == 0).expand(shape)


def _real_tokens(mask: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
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
