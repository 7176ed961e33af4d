"""The judge of PEFT's own tests (benchmarks/peft_suite/); these run outside CI."""

import re

import pytest

from benchmarks.peft_suite.expected import EXPECTED, Expected, judge
from benchmarks.peft_suite.plugin import Outcome

LISTED = (Expected("merging is refused", "cannot be merged", (r"::test_merge\[",)),)
MERGE = "test_a.py::T::test_merge[tied]"
OTHER = "test_a.py::T::test_other[tied]"


@pytest.mark.parametrize(
    "outcome, whole, problem",
    [
        (Outcome(MERGE, "failed", "it cannot be merged"), True, None),
        (Outcome(MERGE, "failed", "KeyError"), True, "not listed: KeyError"),
        (Outcome(MERGE, "passed", ""), True, "passes, and is listed"),
        (Outcome(OTHER, "failed", "it cannot be merged"), False, "is not listed"),
        (Outcome(OTHER, "passed", ""), True, "matches no test"),
        (Outcome(OTHER, "passed", ""), False, None),
        (Outcome(MERGE, "skipped", ""), True, "matches no test"),
    ],
)
def test_failures_are_those_of_the_list(outcome, whole, problem):
    counts, problems = judge([outcome], LISTED, whole)
    as_listed = outcome == Outcome(MERGE, "failed", "it cannot be merged")
    assert counts == {"merging is refused": int(as_listed)}
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


def test_the_list_is_well_formed():
    patterns = [pattern for entry in EXPECTED for pattern in entry.tests]
    assert len(set(patterns)) == len(patterns)
    for text in [*patterns, *(entry.message for entry in EXPECTED)]:
        re.compile(text)
        assert not re.search(text, "")
    assert len({entry.reason for entry in EXPECTED}) == len(EXPECTED)
