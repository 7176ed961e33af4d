"""Answers in bfloat16, where two right computations do not agree to a bit."""

import torch
from vllm_runs import Reference, ask, conversation, every, prompts


def test_bfloat16_differs_by_no_more_than_two_roundings(
    start, directory, reference, check
):
    rounded = Reference(directory, dtype=torch.bfloat16)
    llm = start(dtype="bfloat16")
    texts = [*prompts((1, 3, 9, 14, 33, 64, 90)), conversation((9, 4))]
    answers = ask(llm, directory, every(texts))
    # How far transformers' bfloat16 is from its float32, on the same tokens: as far may
    # be vLLM's, on the other side.
    error = max(_error(rounded, reference, answer) for answer in answers)
    kind = f"bfloat16 (the margin: {2 * error:.2f})"
    # The edits of some adapters are smaller than that.
    check(kind, answers, reference=rounded, rounding=2 * error, least_edited=0.5)


def _error(rounded: Reference, exact: Reference, answer) -> float:
    asked, tokens = answer.asked, torch.tensor(answer.tokens)[:, None]
    begin = len(asked.prompt) - 1
    found, expected = (
        reference.logprobs(asked.adapter, asked.prompt, answer.tokens)[begin:-1]
        for reference in (rounded, exact)
    )
    return (found - expected).gather(1, tokens).abs().max().item()
