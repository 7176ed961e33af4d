"""Requests of several adapters and of none in one batch."""

import pytest
import torch
from vllm_runs import ADAPTERS, LAYERS, Asked, ask, conversation, every, prompts

LENGTHS = (1, 2, 3, 5, 9, 13, 14, 15, 16, 17, 31, 32, 33, 64, 90)


@pytest.fixture(scope="module")
def llm(start):
    return start(enable_prefix_caching=False)


def test_twelve_adapters_in_four_slots_beside_the_base(llm, directory, check):
    texts = [*prompts(LENGTHS), conversation((9, 4)), conversation((3, 8, 2))]
    check("mixed batches, 12 adapters in 4 slots", ask(llm, directory, every(texts)))


def test_prompts_shorter_than_the_positions(llm, directory, check):
    check(
        "prompts of 1 to 6 tokens",
        ask(llm, directory, every(prompts(range(1, 7), seed=3)), max_tokens=4),
    )


def test_several_answers_to_a_prompt(llm, directory, check):
    asked = every(prompts((6, 20), seed=1))
    answers = ask(llm, directory, asked, n=3, temperature=1.0, seed=7)
    assert len(answers) == 3 * len(asked)
    check("n = 3, sampled", answers)


def test_logprobs_of_prompts(llm, directory, check):
    asked = every(prompts((2, 12, 40), seed=2))
    answers = ask(llm, directory, asked, prompt_logprobs=1)
    assert all(len(a.prompt_logprobs) == len(a.asked.prompt) - 1 for a in answers)
    check("prompt_logprobs", answers)


def test_every_token_of_an_answer_where_all_are_edited(llm, directory, check):
    asked = every(prompts((1, 7, 30), seed=4), (None, "all", "untied"))
    check("positions: all, 40 tokens", ask(llm, directory, asked, max_tokens=40))


def test_answers_are_those_of_generate(llm, directory, reference):
    prompt = prompts((23,), seed=5)[0]
    for adapter in ADAPTERS:
        reference.model.set_adapter(adapter)
        expected = reference.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, 23, dtype=torch.long),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
        )[0, 23:].tolist()
        found = ask(llm, directory, [Asked(adapter, prompt)])[0].tokens
        assert found == expected


def test_every_layer_of_the_model_is_edited_once(llm):
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    names = [type(m).__name__ for m in worker.worker.model_runner.model.modules()]
    assert names.count("LoreftLlamaDecoderLayer") == LAYERS
    assert "LlamaDecoderLayer" not in names
