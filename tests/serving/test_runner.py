"""The rows of a step that a worker finds, against each request's whole prompt."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stub_engine import CAPACITY, LAYERS, build_batch, build_config, build_layers
from torch import nn

from axolotl_reft import LoreftConfig
from axolotl_reft.serving.edited_tokens import EditedTokens
from axolotl_reft.serving.runner import LoadedAdapter, ServedModel

FIRST = 2**62
LORA = 5
# By slot; one slot is free.
SPECS = {
    FIRST: {"positions": "f3+l2", "tied_weights": False},
    FIRST + 1: {"positions": "l4"},
    FIRST + 2: {"positions": "all"},
}
SLOTS = [FIRST + 1, LORA, None, FIRST, FIRST + 2]


@pytest.fixture
def manager():
    """As vLLM's manager of adapters, of which one is LoRA's."""
    adapters = {
        number: SimpleNamespace(
            loreft=LoadedAdapter(LoreftConfig(**settings).spec(), {})
        )
        for number, settings in SPECS.items()
    }
    return SimpleNamespace(
        lora_index_to_id=SLOTS,
        _registered_adapters=adapters | {LORA: SimpleNamespace()},
    )


@pytest.fixture
def served():
    config = build_config(**{"lora_config.max_loras": len(SLOTS)})
    return ServedModel(build_layers(), config, torch.device("cpu"))


def rows_by_edit(served):
    rows_T, edits_T, starts_E1, _ = served._rows.tensors
    pairs = zip(*(t[: starts_E1[-1]].tolist() for t in (edits_T, rows_T)), strict=True)
    found = {}
    for edit, row in pairs:
        found.setdefault(edit, []).append(row)
    counts = np.diff(starts_E1).tolist()
    assert counts == [len(found.get(edit, ())) for edit in range(len(counts))]
    return found


def build_request(length, strength=None):
    """The state of a request with a prompt of so many tokens."""
    extra = None if strength is None else {"loreft_strength": strength}
    sampling = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(prompt_token_ids=[1] * length, sampling_params=sampling)


def find_rows(served, manager, *requests):
    """The rows by edit, of requests with a prompt of so many tokens, an adapter's
    number, the tokens that are computed before and in the step, and a strength if it is
    not 1."""
    entries = [(number, length, done) for length, number, done, *_ in requests]
    batch = build_batch([(n, *entry) for n, entry in enumerate(entries)])
    states = {
        n: build_request(length, *strength)
        for n, (length, _, _, _, *strength) in enumerate(requests)
    }
    scheduled_B = np.array([request[3] for request in requests], dtype=np.int32)
    served.find_rows(batch, scheduled_B, states, manager)
    return rows_by_edit(served)


UNTIED, SUFFIX, ALL = 2 * SLOTS.index(FIRST), 0, 2 * SLOTS.index(FIRST + 2)


def test_a_whole_prompt_by_an_untied_adapter(served, manager):
    found = find_rows(served, manager, (10, FIRST, 0, 10))
    assert found == {UNTIED: [0, 1, 2], UNTIED + 1: [8, 9]}


def test_several_requests_adapters_lora_and_base_in_a_step(served, manager):
    found = find_rows(
        served,
        manager,
        (4, 0, 0, 4),
        (10, FIRST, 0, 10),
        (6, LORA, 0, 6),
        (10, FIRST + 1, 0, 10),
        (12, FIRST, 2, 5),
        (3, FIRST + 2, 0, 3),
    )
    assert found == {
        SUFFIX: [26, 27, 28, 29],
        UNTIED: [4, 5, 6, 30],
        UNTIED + 1: [12, 13],
        ALL: [35, 36, 37],
    }


def test_decode_steps_are_edited_by_all_alone(served, manager):
    """And where a prompt is computed to its last token, that is no decode step."""
    found = find_rows(
        served,
        manager,
        (10, FIRST, 10, 1),
        (10, FIRST + 2, 14, 1),
        (10, FIRST + 1, 9, 1),
        (10, FIRST + 1, 10, 1),
    )
    assert found == {ALL: [1], SUFFIX: [2]}


def test_a_prompt_that_is_computed_again_with_its_answer(served, manager):
    """After a preemption; the answer's tokens stay as they are."""
    assert find_rows(served, manager, (10, FIRST, 0, 15)) == {
        UNTIED: [0, 1, 2],
        UNTIED + 1: [8, 9],
    }


def test_each_request_has_its_strength(served, manager):
    """In prefill, in chunks, when computed again, and in decode steps of `all`."""
    found = find_rows(
        served,
        manager,
        (10, FIRST, 0, 10, 0.5),
        (10, FIRST, 8, 2),
        (10, FIRST, 0, 4, 2),
        (10, FIRST + 1, 0, 10, 0),
        (3, FIRST + 2, 5, 1, 0.25),
        (3, FIRST + 2, 5, 1, 0),
        (3, FIRST + 2, 5, 1, 3.0),
        (3, FIRST + 2, 5, 1),
        (3, FIRST + 2, 5, 1, 0.25),
    )
    assert found == {
        UNTIED: [0, 1, 2, 12, 13, 14],
        UNTIED + 1: [8, 9, 10, 11],
        ALL: [26, 28, 29, 30],
    }
    prefixes, suffixes = [0.5] * 3 + [2] * 3, [0.5] * 2 + [1] * 2
    expected = [*prefixes, *suffixes, 0.25, 3, 1, 0.25]
    assert served._rows.strengths_T1[: len(expected)].tolist() == expected


@pytest.mark.parametrize("number", [0, LORA])
def test_a_step_without_loreft_edits_nothing(served, manager, number):
    find_rows(served, manager, (10, FIRST, 0, 10))
    assert find_rows(served, manager, (10, number, 0, 10)) == {}


def test_rows_are_cleared(served, manager):
    find_rows(served, manager, (10, FIRST, 0, 10))
    served.clear_rows()
    assert rows_by_edit(served) == {}


def test_any_schedule_edits_the_tokens_of_the_whole_prompts(served, manager):
    """Requests come, go on in chunks of any size and in any order, and end."""
    draw = random.Random(0)
    numbers = [0, LORA, *SPECS]
    waiting = [
        (n, draw.choice(numbers), draw.randint(1, 30), draw.randint(1, 4))
        for n in range(40)
    ]
    states = {n: build_request(length) for n, _, length, _ in waiting}
    edited, expected = set(), set()
    for n, number, length, answer in waiting:
        if number in SPECS:
            spec, stop = manager._registered_adapters[number].loreft.spec, length
            sides = EditedTokens(spec, [1] * length).between(0, stop + answer)
            slot = SLOTS.index(number)
            expected |= {
                (n, 2 * slot + side, token)
                for side, tokens in enumerate(sides)
                for token in tokens.tolist()
            }
    computed, running = dict.fromkeys(states, 0), []
    while running or waiting:
        while waiting and len(running) < 6:
            running.append(waiting.pop())
        step = []
        for request in draw.sample(running, draw.randint(1, len(running))):
            n, _, length, answer = request
            left = length - computed[n]
            step.append((request, draw.randint(1, min(left, 9)) if left > 0 else 1))
        batch = build_batch([(*r[:3], computed[r[0]]) for r, _ in step])
        scheduled_B = np.array([count for _, count in step], dtype=np.int32)
        assert scheduled_B.sum() <= CAPACITY
        served.find_rows(batch, scheduled_B, states, manager)
        # Of each row of the step, its request and token.
        tokens = [
            (r[0], computed[r[0]] + place)
            for r, count in step
            for place in range(count)
        ]
        for edit, rows in rows_by_edit(served).items():
            found = {(tokens[row][0], edit, tokens[row][1]) for row in rows}
            assert not found & edited
            edited |= found
        for (n, _, length, answer), count in step:
            computed[n] += count
            if computed[n] == length + answer:
                running = [request for request in running if request[0] != n]
    assert edited == expected


def test_edits_are_loaded_into_the_slots_that_rows_name(manager):
    """A served model edits by what was loaded into an adapter's slot."""
    layers = build_layers()
    config = build_config(**{"lora_config.max_loras": len(SLOTS)})
    served = ServedModel(layers, config, torch.device("cpu"))
    rank, (hidden_TD, residual_TD) = 2, torch.randn(2, 10, 16)
    adapter = manager._registered_adapters[FIRST].loreft
    stack = torch.zeros(2, rank, 16), torch.ones(2, rank), torch.ones(2, rank, 16)
    stack[2][1] *= 10
    served.load(SLOTS.index(FIRST), adapter._replace(stacks={1: stack}))
    with torch.no_grad():
        before_TD = sum(layers[1](hidden_TD, residual_TD))
        find_rows(served, manager, (10, FIRST, 0, 10))
        added_TD = sum(layers[1](hidden_TD, residual_TD)) - before_TD
    expected_T = torch.tensor([2.0] * 3 + [0.0] * 5 + [20.0] * 2)
    torch.testing.assert_close(added_TD, expected_T[:, None].expand(-1, 16))


def test_a_model_of_other_layers_is_refused():
    class Model(nn.Module):
        pass

    with pytest.raises(ValueError, match=f"Model has 0 layers .*, expected {LAYERS}"):
        ServedModel(Model(), build_config(), torch.device("cpu"))
