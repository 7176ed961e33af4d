"""The checks of one architecture, each against the reference.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from axolotl_reft import LoreftConfig
from axolotl_reft.core.interventions import Intervention
from benchmarks.sweep.findings import BaseFailed, Finding, failed, first_line
from benchmarks.sweep.inputs import Inputs, others
from benchmarks.sweep.reference import Layers, NotFound, Reference, find_layers

TOLERANCE = 1e-4
# Of the text; tokens of images and sounds come before it.
_LENGTH, _SHORTER, _PROMPT, _SHORTER_PROMPT = 37, 30, 21, 17
NEW = 4
_POSITIONS = "f2+l2"
_RANK = 3


class Subject:
    """An architecture's base, with what the checks make of it."""

    def __init__(self, base: PreTrainedModel, kind: str, inputs: Inputs) -> None:
        self.base, self.kind, self.inputs = base, kind, inputs
        self.generates = base.can_generate()
        parameters = inspect.signature(base.forward).parameters
        self.takes_labels = "labels" in parameters and self.kind != "encoder"
        self.takes_mask = "attention_mask" in parameters
        count = inputs.count
        self.length, self.shorter = _LENGTH + count, _SHORTER + count
        self.prompt, self.shorter_prompt = _PROMPT + count, _SHORTER_PROMPT + count
        self.width = base.config.get_text_config().hidden_size

    # --- inputs --------------------------------------------------------------------

    def ids(self, rows: int, tokens: int, seed: int = 0) -> Tensor:
        return self.inputs.ids(rows, tokens, seed)

    def padded(self, left: bool, lengths: tuple[int, int]) -> dict[str, Tensor]:
        """Return a batch of two rows, the second of which is shorter."""
        ids_BT = self.ids(2, lengths[0])
        mask_BT = torch.ones_like(ids_BT)
        gap = lengths[0] - lengths[1]
        kept = ids_BT[1, : lengths[1]].clone()
        empty, text = (slice(None, gap), slice(gap, None)) if left else (
            slice(lengths[1], None),
            slice(None, lengths[1]),
        )
        ids_BT[1, text], ids_BT[1, empty], mask_BT[1, empty] = kept, 0, 0
        return self.batch(ids_BT, mask_BT)

    def batch(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> dict[str, Any]:
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        inputs = {"input_ids": ids_BT, **self.inputs.extras(ids_BT)}
        return inputs | {"attention_mask": mask_BT} if self.takes_mask else inputs

    def forward(self, model: nn.Module, rows: int, tokens: int) -> Tensor:
        return output(model(**self.batch(self.ids(rows, tokens))))

    # --- models --------------------------------------------------------------------

    def adapted(self, positions: str) -> PeftModel:
        torch.manual_seed(1)
        config = LoreftConfig(positions=positions, rank=_RANK)
        model = get_peft_model(copy.deepcopy(self.base), config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        return model

    @cached_property
    def adapter(self) -> PeftModel:
        return self.adapted(_POSITIONS)

    @cached_property
    def layers(self) -> Layers:
        return find_layers(self.base, self.width, self.forward)

    def reference_of(self, adapter: PeftModel) -> Reference:
        return Reference(self.base, self.layers, interventions(adapter))

    @cached_property
    def reference(self) -> Reference:
        return self.reference_of(self.adapter)


def output(result: Any) -> Tensor:
    """Return a model's logits, or a base model's hidden states."""
    logits = getattr(result, "logits", None)
    if logits is None:
        logits = result.last_hidden_state
    return logits


def interventions(adapter: PeftModel) -> list[Intervention]:
    return [m for m in adapter.modules() if isinstance(m, Intervention)]


def relative(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest value; not finite counts whole."""
    got, expected = got.detach(), expected.detach()
    if got.shape != expected.shape:
        return float("inf")
    finite = torch.isfinite(expected)
    if not finite.any() or not torch.isfinite(got[finite]).all():
        return float("nan")
    got, expected = got[finite], expected[finite]
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@contextmanager
def by_itself() -> Iterator[None]:
    """Tell errors of the base and the reference from the adapter's."""
    try:
        yield
    except Exception as error:
        raise BaseFailed(first_line(error)) from error


def columns(*texts: tuple[int, int]) -> list[list[int]]:
    """Return the first two and the last two columns of texts from, to."""
    return [[begin, begin + 1, end - 2, end - 1] for begin, end in texts]


def finding(check: str, difference: float, base: float | None = None) -> Finding:
    allowed = max(TOLERANCE, 10 * (base or 0.0))
    verdict = "right" if difference <= allowed else "WRONG"
    return Finding(check, verdict, difference, base)


def checked(
    run: Callable[[Subject], Iterator[Finding]], subject: Subject
) -> Iterator[Finding]:
    """Run a check; an error is a finding too."""
    try:
        yield from run(subject)
    except NotFound as error:
        yield Finding(run.__name__, "not compared", message=str(error))
    except BaseFailed as error:
        yield Finding(run.__name__, "base itself", message=str(error))
    except Exception as error:
        yield failed(run.__name__, error)


# --- the checks ------------------------------------------------------------------------


def one_row(subject: Subject) -> Iterator[Finding]:
    """One row's logits are the reference's."""
    batch = subject.batch(subject.ids(1, subject.length))
    with torch.no_grad():
        with by_itself():
            plain = output(subject.base(**batch))
        got = output(subject.adapter(**batch))
        count = len(interventions(subject.adapter))
        if count != subject.layers.count:
            message = f"edits {count} layers of {subject.layers.count}"
            yield Finding("one row", "WRONG", message=message)
            return
        with subject.reference.editing(columns((0, subject.length))) as model:
            expected = output(model(**batch))
        if relative(expected, plain) < 10 * TOLERANCE:
            yield Finding("one row", "not compared", message="the edit has no effect")
        yield finding("one row", relative(got, expected))
        everywhere = subject.adapted("all")
        with subject.reference_of(everywhere).editing(None) as model:
            expected = output(model(**batch))
        yield finding("every token", relative(output(everywhere(**batch)), expected))


def batches(subject: Subject) -> Iterator[Finding]:
    """Rows of a batch are edited as each alone is."""
    sides = {"two rows": None, "right padding": False}
    if subject.kind in ("causal", "multimodal"):
        sides["left padding"] = True
    for name, left in sides.items():
        if left is not None and not subject.takes_mask:
            continue
        shorter = subject.length if left is None else subject.shorter
        batch = subject.padded(bool(left), (subject.length, shorter))
        begin = subject.length - shorter if left else 0
        text = slice(begin, begin + shorter)
        alone = subject.batch(batch["input_ids"][1:, text])
        with torch.no_grad():
            got = output(subject.adapter(**batch))
            with subject.reference.editing(
                columns((0, subject.length), (begin, begin + shorter))
            ) as model:
                expected = output(model(**batch))
            by_itself = output(subject.adapter(**alone))
            base = relative(
                output(subject.base(**batch))[1:, text], output(subject.base(**alone))
            )
        yield finding(
            name,
            max(
                relative(got[:1], expected[:1]),
                relative(got[1:, text], expected[1:, text]),
            ),
        )
        yield finding(f"{name}, alone", relative(got[1:, text], by_itself), base)


def labels(subject: Subject) -> Iterator[Finding]:
    """Loss and gradients are the reference's."""
    batch, where = training_batch(subject)
    with by_itself():
        loss_and_gradients = gradients(subject, subject.reference.model, batch, where)
    expected_loss, expected = loss_and_gradients
    loss, got = gradients(subject, subject.adapter, batch, None)
    yield finding("loss", relative(loss, expected_loss))
    yield finding("gradients", _worst(got, expected))
    if not any(g.abs().max() > 0 for g in expected):
        yield Finding("gradients", "not compared", message="the reference's are zero")


def training_batch(subject: Subject) -> tuple[dict[str, Tensor], list[list[int]]]:
    batch = subject.padded(False, (subject.length, subject.shorter))
    if not subject.takes_mask:
        batch = subject.batch(subject.ids(2, subject.length))
    shorter = subject.shorter if subject.takes_mask else subject.length
    where = columns((0, subject.length), (0, shorter))
    if subject.takes_labels:
        labels_BT = batch["input_ids"].clone()
        labels_BT[1, shorter:] = -100
        if subject.generates:
            labels_BT[0, :subject.prompt] = labels_BT[1, :subject.shorter_prompt] = -100
            where = columns((0, subject.prompt), (0, subject.shorter_prompt))
        batch["labels"] = labels_BT
    return batch, where


def gradients(
    subject: Subject,
    model: nn.Module,
    batch: dict[str, Tensor],
    where: list[list[int]] | None,
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the gradients of every parameter of the adapter."""
    if where is not None:
        subject.reference._columns = where
        subject.reference._prompt = 0
    parameters = [p for p in subject.adapter.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    result = model(**batch)
    loss = getattr(result, "loss", None)
    if loss is None:
        h = output(result)
        weight = torch.randn(h.shape, generator=torch.Generator().manual_seed(2))
        if "attention_mask" in batch:
            weight = weight * batch["attention_mask"][..., None]
        loss = (h * weight).sum()
    loss.backward()
    found = [
        torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters
    ]
    return loss.detach(), found


def _worst(got: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(got, expected, strict=True)
    return max(relative(g, e) if e.abs().max() > 0 else float(g.abs().max()) for g, e in pairs)


def checkpointing(subject: Subject) -> Iterator[Finding]:
    """Gradients under gradient checkpointing are the reference's in training mode."""
    if not subject.base.supports_gradient_checkpointing:
        return
    batch, where = training_batch(subject)
    model = subject.reference.model.train()
    try:
        with by_itself():
            _, expected = gradients(subject, model, batch, where)
            model.gradient_checkpointing_enable({"use_reentrant": False})
            _, again = gradients(subject, model, batch, where)
            model.gradient_checkpointing_disable()
        base = _worst(again, expected)
        for reentrant in (False, True):
            adapter = subject.adapter.train()
            adapter.gradient_checkpointing_enable({"use_reentrant": reentrant})
            try:
                _, got = gradients(subject, adapter, batch, None)
            finally:
                adapter.base_model.model.gradient_checkpointing_disable()
            name = "reentrant checkpointing" if reentrant else "checkpointing"
            yield finding(name, _worst(got, expected), base)
    finally:
        model.eval()
        subject.adapter.eval()


def caches(subject: Subject) -> Iterator[Finding]:
    """Greedy generation with a cache and without gives the reference's logits."""
    if not subject.generates:
        return
    row = subject.batch(subject.ids(1, subject.length, seed=3))
    prompts = {"generate": (row, columns((0, subject.length)))}
    if subject.takes_mask:
        both = subject.padded(True, (subject.length, subject.shorter))
        at = columns((0, subject.length), (subject.length - subject.shorter, subject.length))
        prompts["generate, left padding"] = (both, at)
    for name, (batch, where) in prompts.items():
        found = {}
        for use_cache in (False, True):
            with by_itself():
                with subject.reference.editing(where, subject.length) as model:
                    expected = greedy(model, batch, use_cache)
                plain = greedy(subject.base, batch, use_cache)
            got = greedy(subject.adapter, batch, use_cache)
            found[use_cache] = got, plain
            suffix = "" if use_cache else ", no cache"
            yield finding(name + suffix, _agreement(got, expected))
        base = _agreement(found[True][1], found[False][1])
        difference = _agreement(found[True][0], found[False][0])
        yield finding(f"{name}, cached or not", difference, base)


Steps = tuple[Tensor, Tensor]


def greedy(model: Any, batch: dict[str, Tensor], use_cache: bool) -> Steps:
    """Return the ids and the logits (B, T, vocabulary) of the steps."""
    with torch.no_grad():
        result = model.generate(
            **batch,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            num_beams=1,
            use_cache=use_cache,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return result.sequences, torch.stack(result.logits, 1)


def _agreement(got: Steps, expected: Steps) -> float:
    """Compare logits up to the first step whose history differs."""
    if got[1].shape != expected[1].shape:
        return float("inf")
    steps = got[1].shape[1]
    same = (got[0][:, -steps:] == expected[0][:, -steps:]).all(0).long().cumprod(0)
    steps = min(int(same.sum()) + 1, steps)
    return relative(got[1][:, :steps], expected[1][:, :steps])


def reload(subject: Subject) -> Iterator[Finding]:
    """A saved adapter on a fresh base has the same logits."""
    batch = subject.batch(subject.ids(2, subject.length))
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        subject.adapter.save_pretrained(directory)
        loaded = PeftModel.from_pretrained(copy.deepcopy(subject.base), directory)
        expected = output(subject.adapter(**batch))
        yield finding("reload", relative(output(loaded.eval()(**batch)), expected))


def other_inputs(subject: Subject) -> Iterator[Finding]:
    """With images and sounds before the text, which no layer of theirs changes."""
    if subject.kind != "multimodal" or subject.inputs.name != "text":
        return
    for inputs in others(subject.base):
        with_others = Subject(subject.base, subject.kind, inputs)
        with_others.adapter, with_others.layers = subject.adapter, subject.layers
        for run in (one_row, batches, labels, caches):
            for found in checked(run, with_others):
                yield replace(found, check=f"{inputs.name}: {found.check}")


CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    one_row,
    batches,
    labels,
    caches,
    reload,
    checkpointing,
    other_inputs,
)
