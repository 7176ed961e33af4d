"""How a check ended, and the table's verdict of all of an architecture's."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-4
# From the best to the worst.
VERDICTS = ("base itself", "right", "refused", "not compared", "not built", "WRONG")


@dataclass
class Finding:
    """How one check of an architecture ended.

    Attributes:
        difference: the largest of the adapter's logits or gradients to the reference's,
            over the largest; None where there was nothing to compare.
        base: the same between two ways to run the base itself, where the check has two.
    """

    check: str
    verdict: str
    difference: float | None = None
    base: float | None = None
    message: str = ""

    @property
    def is_refused_input(self) -> bool:
        return self.verdict == "refused" and ": " in self.check


@dataclass
class Row:
    """One architecture's row of the table."""

    name: str
    kind: str
    model_type: str
    findings: list[Finding] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        # What is refused only with images or sounds is said in a note.
        verdicts = {f.verdict for f in self.findings if not f.is_refused_input}
        return max(verdicts, key=VERDICTS.index, default="not built")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, saved: dict[str, Any]) -> Row:
        findings = [Finding(**finding) for finding in saved["findings"]]
        return cls(**saved | {"findings": findings})


class BaseFailed(Exception):
    """The base by itself, or the reference, does not do what is checked."""


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def failed(check: str, error: Exception) -> Finding:
    """Return the finding of a check that ended in an error of the adapter's."""
    verdict = "refused" if _is_refusal(error) else "WRONG"
    return Finding(check, verdict, message=first_line(error))


def _is_refusal(error: BaseException) -> bool:
    """Whether the package raised the error itself, and it is not a crash."""
    if not isinstance(error, (ValueError, RuntimeError, TypeError)):
        return False
    *_, last = traceback.extract_tb(error.__traceback__)
    return "axolotl_reft" in last.filename and (last.line or "").startswith("raise")


@contextmanager
def by_itself() -> Iterator[None]:
    """Tell errors of the base and the reference from the adapter's."""
    try:
        yield
    except Exception as error:
        raise BaseFailed(first_line(error)) from error


def relative(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest value; not finite counts whole."""
    got, expected = got.detach(), expected.detach()
    if got.shape != expected.shape:
        return float("inf")
    # Some models give tokens that are no text the least number there is.
    finite = torch.isfinite(expected) & (expected.abs() < 1e30)
    if not finite.any() or not torch.isfinite(got[finite]).all():
        return float("nan")
    got, expected = got[finite], expected[finite]
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def compared(
    check: str, difference: float, base: float | None = None, edited: float = 0.0
) -> Finding:
    """Return the finding of a difference, where the base itself and the reference have
    these between the same two ways to run them."""
    allowed = max(TOLERANCE, 10 * max(base or 0.0, edited))
    verdict = "right" if difference <= allowed else "WRONG"
    return Finding(check, verdict, difference, base)
