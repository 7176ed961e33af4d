"""Requests with strengths of their own, compared with transformers at the same ones."""

import random

import pytest
from vllm_runs import ADAPTERS, Asked, ask, conversation, prompts

STRENGTHS = (1.0, 0.5, 0.25, -1.0, 1.5)


def at_several(texts, adapters=ADAPTERS, strengths=STRENGTHS):
    """Every prompt with every adapter, at some strengths, in a mixed order."""
    draw = random.Random(0)
    asked = [
        Asked(adapter, text, strength)
        for adapter in adapters
        for text in texts
        for strength in draw.sample(strengths, 2)
    ]
    asked += [Asked(None, text) for text in texts]
    draw.shuffle(asked)
    return asked


def test_mixed_batches(start, directory, check):
    llm = start(enable_prefix_caching=False)
    texts = [*prompts((3, 9, 14, 33, 90), seed=70), conversation((9, 4))]
    answers = ask(llm, directory, at_several(texts), max_tokens=12)
    check("strengths, mixed batches", answers, least_edited=0.7)
    check_0_is_the_base(llm, directory)
    with pytest.raises(ValueError, match="loreft_strength: nan is not a finite number"):
        ask(llm, directory, [Asked("last", texts[0], float("nan"))])


def check_0_is_the_base(llm, directory):
    """To the bit."""
    texts = prompts((9, 40), seed=71)
    for text in texts:
        (base,) = ask(llm, directory, [Asked(None, text)])
        for adapter in ADAPTERS:
            (answer,) = ask(llm, directory, [Asked(adapter, text, 0)])
            assert (answer.tokens, answer.logprobs) == (base.tokens, base.logprobs)


def test_prompts_in_chunks(start, directory, check):
    llm = start(max_num_batched_tokens=17, enable_prefix_caching=False)
    texts = [*prompts((5, 18, 35, 70), seed=72), conversation((9, 20))]
    answers = ask(llm, directory, at_several(texts))
    check("strengths, chunks of 17 tokens", answers, least_edited=0.7)


@pytest.mark.parametrize("cached", [False, True])
def test_preempted_requests(start, directory, check, cached):
    llm = start(
        num_gpu_blocks_override=10, max_model_len=128, enable_prefix_caching=cached
    )
    asked = at_several(prompts((20, 37, 50), seed=73))
    answers = ask(llm, directory, asked, max_tokens=48)
    found = {metric.name: metric for metric in llm.get_metrics()}
    preempted = found["vllm:num_preemptions"].value
    assert preempted > len(asked) // 3
    kind = f"strengths, preempted ({preempted} times, prefix caching: {cached})"
    check(kind, answers, least_edited=0.7)


def test_the_prefix_cache(start, directory, check):
    llm = start(enable_prefix_caching=True)
    begin, answers = prompts((90,), seed=74)[0], []
    texts = [begin[:70], begin, *(begin + more for more in prompts((6, 40), seed=75))]
    for strength in (0.5, 1.0, 0.5, 1.5):
        for text in texts:
            asked = [Asked(adapter, text, strength) for adapter in ADAPTERS]
            answers += ask(llm, directory, asked)
    check("strengths, prefix caching", answers, least_edited=0.7)
    # Of f7 every block is its strength's own; of l7 those before the suffix are shared,
    # and those that are not edited at all.
    prompt = prompts((230,), seed=76)[0]
    for adapter, shared in {"first_and_last": 0, "last": 192, "all": 0}.items():
        cached = []
        for strength in (0.0, 1.0, 0.5, 0.5, 1.0, 0.0):
            asked = [Asked(adapter, prompt, strength)]
            cached.append(ask(llm, directory, asked)[0].cached)
        first = 0 if adapter == "first_and_last" else 224
        assert cached == [first, shared, shared, 224, 224, 224]
        base = ask(llm, directory, [Asked(None, prompt)])[0]
        assert base.cached == 224


def test_several_answers_and_logprobs_of_the_prompt(start, directory, check):
    llm = start(enable_prefix_caching=False)
    asked = at_several(prompts((6, 20), seed=77), ("last", "all", "untied"))
    sampled = ask(llm, directory, asked, n=3, temperature=1.0, seed=7)
    check("strengths, n = 3", sampled, least_edited=0.7)
    answers = ask(llm, directory, asked, prompt_logprobs=1)
    check("strengths, prompt_logprobs", answers, least_edited=0.7)
    texts = prompts((6, 7, 8, 9), seed=79)
    asked = [Asked("all", text, s) for text in texts for s in (0.5, 1.0, 1.5)]
    answers = ask(llm, directory, asked, max_tokens=20)
    check("strengths in turn, positions: all", answers)
