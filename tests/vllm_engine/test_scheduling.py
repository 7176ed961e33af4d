"""Prompts in chunks, and requests that are put back and computed again."""

import pytest
from vllm_runs import ask, conversation, every, prompts


@pytest.mark.parametrize("budget", [17, 33])
def test_prompts_in_chunks(start, directory, check, budget):
    llm = start(max_num_batched_tokens=budget, enable_prefix_caching=False)
    texts = [*prompts((1, 5, 16, 18, 35, 70, 100)), *map(conversation, _TURNS)]
    check(f"chunks of {budget} tokens", ask(llm, directory, every(texts)))


_TURNS = [(9, 20), (3, 30, 2)]


@pytest.mark.parametrize("cached", [False, True])
def test_preempted_requests(start, directory, check, cached):
    llm = start(
        num_gpu_blocks_override=10, max_model_len=128, enable_prefix_caching=cached
    )
    asked = every(prompts((20, 30, 37, 50), seed=6))
    answers = ask(llm, directory, asked, max_tokens=48)
    found = {metric.name: metric for metric in llm.get_metrics()}
    preempted = found["vllm:num_preemptions"].value
    assert preempted > len(asked) // 2
    check(f"preempted ({preempted} times, prefix caching: {cached})", answers)
