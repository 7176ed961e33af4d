"""The checks of losses and gradients.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.sweep.findings import Finding, by_itself, compared, relative
from benchmarks.sweep.subject import Subject, columns, output


def labels(subject: Subject) -> Iterator[Finding]:
    """Loss and gradients are the reference's."""
    batch, where = training_batch(subject)
    with by_itself():
        model = subject.reference.edit(where)
        loss_and_gradients = gradients(subject.adapter, model, batch)
    expected_loss, expected = loss_and_gradients
    loss, got = gradients(subject.adapter, subject.adapter, batch)
    yield compared("loss", relative(loss, expected_loss))
    yield compared("gradients", worst(got, expected))
    if not any(g.abs().max() > 0 for g in expected):
        yield Finding("gradients", "not compared", message="the reference's are zero")


def training_batch(
    subject: Subject, left: bool = False
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Return a batch of two rows, the second shorter and padded where the base takes a
    mask, with labels; and the columns that ``f2+l2`` edits."""
    batch = subject.padded(left, (subject.length, subject.shorter))
    if not subject.takes_mask:
        batch = subject.batch(subject.ids(2, subject.length))
    shorter = subject.shorter if subject.takes_mask else subject.length
    begin = subject.length - shorter if left else 0
    where = columns((0, subject.length), (begin, begin + shorter))
    if subject.takes_labels:
        labels_BT = batch["input_ids"].clone()
        labels_BT[1, :begin] = labels_BT[1, begin + shorter :] = -100
        if subject.generates:
            end = begin + subject.shorter_prompt
            labels_BT[0, : subject.prompt] = labels_BT[1, :end] = -100
            where = columns((0, subject.prompt), (begin, end))
        batch["labels"] = labels_BT
    return batch, where


def gradients(
    adapter: nn.Module, model: nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return a model's loss and the gradients of every parameter of the adapter."""
    parameters = [p for p in adapter.parameters() if p.requires_grad]
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


def worst(got: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(got, expected, strict=True)
    return max(
        relative(g, e) if e.abs().max() > 0 else float(g.abs().max()) for g, e in pairs
    )


def checkpointing(subject: Subject) -> Iterator[Finding]:
    """Gradients under gradient checkpointing are the reference's in training mode."""
    if not subject.base.supports_gradient_checkpointing:
        return
    batch, where = training_batch(subject)
    model = subject.reference.edit(where).train()
    adapter = subject.adapter
    try:
        with by_itself():
            _, expected = gradients(adapter, model, batch)
            model.gradient_checkpointing_enable({"use_reentrant": False})
            _, again = gradients(adapter, model, batch)
            model.gradient_checkpointing_disable()
        base = worst(again, expected)
        for reentrant in (False, True):
            adapter.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
            try:
                _, got = gradients(adapter, adapter, batch)
            finally:
                adapter.base_model.model.gradient_checkpointing_disable()
            name = "reentrant checkpointing" if reentrant else "checkpointing"
            yield compared(name, worst(got, expected), base)
    finally:
        model.eval()
        adapter.eval()
