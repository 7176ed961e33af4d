"""The edited tokens of a request: those of the tuner, under any chunking, and the keys
of the blocks that they are in."""

import random
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, build_adapter, build_model

from axolotl_reft import LoreftConfig
from axolotl_reft.core.interventions import Intervention
from axolotl_reft.serving.edited_tokens import EditedTokens

MARKERS = {"generation_prompts": [[10, 11], [13]], "end_of_turn": [12]}
PIECES = [*MARKERS["generation_prompts"], MARKERS["end_of_turn"], [10], [11]]
UNTIED = {"tied_weights": False}
SETTINGS = {
    "untied": {"positions": "f3+l2", **UNTIED},
    "tied": {"positions": "f2+l5"},
    "a prefix": {"positions": "f7"},
    "a suffix": {"positions": "l7"},
    "a token": {"positions": "l1"},
    "every turn": {"positions": "f2+l3", "turn_markers": MARKERS, **UNTIED},
    "the first turn": {"positions": "f2+l3", "turn_markers": MARKERS, "turns": "first"},
    "turns, tied": {"positions": "f1+l2", "turn_markers": MARKERS},
    "all": {"positions": "all"},
}
BLOCK = 4


def prompts(count=25):
    """Ids of 1 to 40 tokens, with marks of turns in many."""
    draw = random.Random(0)
    found = [[5], [10, 11], [5, 10, 11]]
    while len(found) < count:
        ids = []
        for _ in range(draw.randint(1, 6)):
            ids += [draw.randrange(14, VOCABULARY) for _ in range(draw.randint(0, 7))]
            ids += draw.choice(PIECES)
        found.append(ids[: draw.randint(1, len(ids))])
    return found


def edited_tokens(name, prompt):
    return EditedTokens(LoreftConfig(**SETTINGS[name]).spec(), prompt)


def lists(sides):
    return [places.tolist() for places in sides]


def edited_by_the_tuner(model, prompt):
    """The tokens of each intervention of the first layer, whose edit is to add the same
    to all of them."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        after = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        with model.disable_adapter():
            before = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        added_TD = (after - before)[0]
        sides = [
            (added_TD - intervention(torch.zeros(1, added_TD.shape[1]))).abs().amax(1)
            for intervention in model.modules()
            if isinstance(intervention, Intervention)
        ]
    edited = sum(distance_T < 1e-3 for distance_T in sides)
    assert torch.equal(edited == 1, added_TD.abs().amax(1) > 0)
    return [(distance_T < 1e-3).nonzero().flatten().tolist() for distance_T in sides]


@pytest.mark.parametrize("name", SETTINGS)
def test_they_are_those_that_the_tuner_edits(name):
    model = build_adapter(
        build_model(), layers="0", intervention="lobireft", rank=2, **SETTINGS[name]
    )
    for prompt in prompts():
        got = lists(edited_tokens(name, prompt).between(0, len(prompt)))
        assert got == edited_by_the_tuner(model, prompt)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_part_has_those_of_the_whole(name):
    """Every part, so every chunking; and tokens that are generated."""
    for prompt in prompts():
        tokens, length = edited_tokens(name, prompt), len(prompt) + 3
        whole = lists(tokens.between(0, length))
        for start, stop in combinations(range(length + 1), 2):
            expected = [
                [place - start for place in side if start <= place < stop]
                for side in whole
            ]
            assert lists(tokens.between(start, stop)) == expected


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "all"])
def test_a_generated_token_is_not_edited(name):
    for prompt in prompts():
        sides = edited_tokens(name, prompt).between(len(prompt), len(prompt) + 9)
        assert not any(places.size for places in sides)


def test_all_edits_every_token_by_one_intervention():
    assert lists(edited_tokens("all", [5, 6]).between(1, 4)) == [[0, 1, 2]]


def test_a_prompt_too_short_for_a_side_is_edited_as_in_training():
    """No side takes more than half of a prompt."""
    assert lists(edited_tokens("untied", [5]).between(0, 1)) == [[], []]
    assert lists(edited_tokens("untied", [5, 6, 7]).between(0, 3)) == [[0], [2]]


def blocks(count):
    return [(start, start + BLOCK) for start in range(0, count, BLOCK)]


def test_keys_are_equal_where_the_same_adapter_edits_the_same_places():
    keys = {}
    for number, name in enumerate(SETTINGS):
        for adapter in (bytes([number] * 8), bytes([100 + number] * 8)):
            for prompt in prompts():
                tokens = edited_tokens(name, prompt)
                for start, stop in blocks(len(prompt) + 5):
                    sides = lists(tokens.between(start, stop))
                    edits = (adapter, str(sides)) if any(sides) else None
                    keys.setdefault(edits, set()).add(tokens.key(adapter, start, stop))
    assert keys[None] == {None}
    assert all(len(of_edits) == 1 for of_edits in keys.values())
    assert len(set.union(*keys.values())) == len(keys)


def test_adapters_of_a_suffix_share_all_before_it():
    prompt = np.arange(14, 54).tolist()
    suffix = edited_tokens("a suffix", prompt)
    token = edited_tokens("a token", prompt)
    keys = [
        (suffix.key(b"suffix", *block), token.key(b"token", *block))
        for block in blocks(len(prompt))
    ]
    assert keys[:8] == [(None, None)] * 8
    assert keys[8][0] is not None and keys[8][1] is None
    assert keys[9][0] != keys[9][1] and None not in keys[9]
