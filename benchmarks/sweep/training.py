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
        loss_and_gradients = gradients(subject, subject.reference.model, batch, where)
    expected_loss, expected = loss_and_gradients
    loss, got = gradients(subject, subject.adapter, batch, None)
    yield compared("loss", relative(loss, expected_loss))
    yield compared("gradients", _worst(got, expected))
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
            labels_BT[0, : subject.prompt] = labels_BT[
                1, : subject.shorter_prompt
            ] = -100
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
        subject.reference.edit(where)
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
    return max(
        relative(g, e) if e.abs().max() > 0 else float(g.abs().max()) for g, e in pairs
    )


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
            yield compared(name, _worst(got, expected), base)
    finally:
        model.eval()
        subject.adapter.eval()
