"""The tests of PEFT's that cannot pass with LoReFT, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.peft_suite.plugin import Outcome


class Expected(NamedTuple):
    """A reason, the message that it shows in, and patterns of the tests it fails.

    Patterns and message are regular expressions, searched for.
    """

    reason: str
    message: str
    tests: tuple[str, ...]


EXPECTED = (
    Expected(
        "Merging is refused: no change of weights edits hidden states at some "
        "positions",
        "cannot be merged into the base model",
        (
            r"::test_\w*merg",
            # The forward passes; the second half merges.
            r"::test_forward_b?float16",
        ),
    ),
    Expected(
        "Adapters are not added up: a weighted sum of rotations is not a rotation. The "
        "test stops before, at LoRA's setting `r`",
        "no setting 'r'",
        (r"::test_weighted_combination_of_adapters\[",),
    ),
    Expected(
        "Interventions stay in float32 whatever the base's dtype",
        r"where False = all\(|{torch\.float32} <= {torch\.b?float16}",
        (
            r"::test_adapter_dtype_autocast\[\w+-False-dtype[01]-"
            r"|::test_add_adapter_no_autocast_adapter_dtype\[",  # Since PEFT 0.21.
        ),
    ),
    Expected(
        "The embeddings' output requires no gradient where only the adapter is "
        "trained: backward would run through the frozen layers below",
        r"where False = .*\.requires_grad",
        (r"(decoder|extraction)_models.*::test_prepare_for_training_parametrized\[",),
    ),
    Expected(
        "A new adapter edits from the start, as the reference implementation's; the "
        "test wants one that changes nothing",
        "where False = .*allclose",
        (r"::test_disable_adapters\[",),
    ),
    Expected(
        "LoReFT edits layers, and has no `target_modules`",
        "no setting 'target_modules'",
        (r"custom_models\.py::.*LoreftConfig\]$",),
    ),
    Expected(
        "What is wrapped is a layer, and has no `in_features`",
        "in_features",
        (r"::test_in_features_out_features_exposed\[",),
    ),
    Expected(
        "Unknown keys of `adapter_config.json` are refused",
        r"unknown key '|no setting '(foobar|spam)'",
        (r"::test_from_json_file\[", r"::test_from_pretrained_forward_compatible"),
    ),
    Expected(
        "A file without `peft_type` is refused with another error",
        "has no peft_type; save the adapter again",
        (r"::test_from_pretrained_sanity_check\[",),
    ),
)


def judge(
    outcomes: Iterable[Outcome], expected: Iterable[Expected], whole: bool
) -> tuple[dict[str, int], list[str]]:
    """Return how many tests each reason fails, and what the list does not say.

    Of a part of the tests (not the ``whole``), patterns without a test say nothing.
    """
    counts, problems = {entry.reason: 0 for entry in expected}, []
    used: set[str] = set()
    for test, outcome, message in outcomes:
        if outcome == "skipped":
            continue
        listed = [
            (entry, pattern)
            for entry in expected
            for pattern in entry.tests
            if re.search(pattern, test)
        ]
        used |= {pattern for _, pattern in listed}
        reasons = [e.reason for e, _ in listed if re.search(e.message, message)]
        if outcome == "passed" and listed:
            problems.append(f"{test} passes, and is listed by {listed[0][1]!r}")
        elif outcome == "failed" and not reasons:
            problems.append(f"{test} fails, and is not listed: {message}")
        elif outcome == "failed":
            counts[reasons[0]] += 1
    patterns = {pattern for entry in expected for pattern in entry.tests}
    if whole:
        problems += [f"{p!r} matches no test" for p in sorted(patterns - used)]
    return counts, problems
