"""The check of forwards in two parts (``frozen_prompt``)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from axolotl_reft.training.frozen_prompt import use_frozen_prompt
from benchmarks.sweep.findings import Finding, by_itself, compared, relative
from benchmarks.sweep.subject import Subject
from benchmarks.sweep.training import gradients, training_batch, worst

# The beginning of the message that a base takes the plain path.
PLAIN = "in one part: "
_ASKED = "frozen_prompt: true, but "


def frozen_prompt(subject: Subject) -> Iterator[Finding]:
    """Loss and gradients in two parts are those in one, and again with what was kept;
    or an error says why there is one part."""
    if not (subject.takes_labels and subject.generates):
        return
    adapter = subject.adapted("l2").train()
    sides = {"right padding": False}
    if subject.takes_mask:
        sides["left padding"] = True
    for name, left in sides.items():
        batch, _ = training_batch(subject, left)
        use_frozen_prompt(adapter, False)
        with by_itself():
            expected = gradients(adapter, adapter, batch)
        told: list[str] = []
        try:
            use_frozen_prompt(adapter, True, "1GB", told.append)
            got = [gradients(adapter, adapter, batch) for _ in range(2)]
        except ValueError as error:
            reason, _, _ = str(error).removeprefix(_ASKED).partition("; ")
            if not str(error).startswith(_ASKED):
                raise
            yield Finding("frozen prompt", "right", message=PLAIN + reason)
            return
        if not any("without gradients" in text for text in told):
            why = "; ".join(told) or "the forward keeps a cache"
            yield Finding("frozen prompt", "right", message=PLAIN + why)
            return
        difference = max(_difference(each, expected) for each in got)
        yield compared(f"frozen prompt, {name}", difference)


def _difference(
    got: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]
) -> float:
    return max(relative(got[0], expected[0]), worst(got[1], expected[1]))
