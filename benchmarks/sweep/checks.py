"""The checks of one architecture, each against the reference."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from peft import PeftModel

from benchmarks.sweep.findings import (
    TOLERANCE,
    BaseFailed,
    Finding,
    by_itself,
    compared,
    failed,
    relative,
)
from benchmarks.sweep.frozen_prompt import frozen_prompt
from benchmarks.sweep.generation import caches
from benchmarks.sweep.inputs import others
from benchmarks.sweep.reference import NotFound
from benchmarks.sweep.subject import Subject, columns, interventions, output
from benchmarks.sweep.training import checkpointing, labels

Check = Callable[[Subject], Iterator[Finding]]


def checked(run: Check, subject: Subject) -> Iterator[Finding]:
    """Run a check; an error is a finding too."""
    try:
        yield from run(subject)
    except NotFound as error:
        yield Finding(run.__name__, "not compared", message=str(error))
    except BaseFailed as error:
        yield Finding(run.__name__, "base itself", message=str(error))
    except Exception as error:
        yield failed(run.__name__, error)


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
        model = subject.reference.edit(columns((0, subject.length)))
        expected = output(model(**batch))
        if relative(expected, plain) < 10 * TOLERANCE:
            yield Finding("one row", "not compared", message="the edit has no effect")
        yield compared("one row", relative(got, expected))
        everywhere = subject.adapted("all")
        expected = output(subject.reference_of(everywhere).edit(None)(**batch))
        yield compared("every token", relative(output(everywhere(**batch)), expected))


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
            got_alone = output(subject.adapter(**alone))
            where = columns((0, subject.length), (begin, begin + shorter))
            with by_itself():
                expected = output(subject.reference.edit(where)(**batch))
                model = subject.reference.edit(columns((0, shorter)))
                expected_alone = output(model(**alone))
                plain = output(subject.base(**batch))[1:, text]
                plain_alone = output(subject.base(**alone))
        yield compared(
            name,
            max(
                relative(got[:1], expected[:1]),
                relative(got[1:, text], expected[1:, text]),
            ),
        )
        yield compared(
            f"{name}, alone",
            relative(got[1:, text], got_alone),
            relative(plain, plain_alone),
            relative(expected[1:, text], expected_alone),
        )


def reload(subject: Subject) -> Iterator[Finding]:
    """A saved adapter on a fresh base has the same logits."""
    batch = subject.batch(subject.ids(2, subject.length))
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        subject.adapter.save_pretrained(directory)
        loaded = PeftModel.from_pretrained(copy.deepcopy(subject.base), directory)
        expected = output(subject.adapter(**batch))
        yield compared("reload", relative(output(loaded.eval()(**batch)), expected))


def other_inputs(subject: Subject) -> Iterator[Finding]:
    """With images and sounds before the text, which no layer of theirs changes."""
    if subject.kind != "multimodal" or subject.inputs.name != "text":
        return
    for inputs in others(subject.base):
        with_others = Subject(subject.base, subject.kind, inputs)
        with_others.adapter = subject.adapter
        for run in (one_row, batches, labels, caches, frozen_prompt):
            for found in checked(run, with_others):
                yield replace(found, check=f"{inputs.name}: {found.check}")


CHECKS: tuple[Check, ...] = (
    one_row,
    batches,
    labels,
    caches,
    reload,
    checkpointing,
    frozen_prompt,
    other_inputs,
)
