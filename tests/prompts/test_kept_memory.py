"""What is kept stays within its limit, and is found again in epochs of any order."""

import pytest
import torch

from axolotl_reft.prompts.kept import KeptStates, States

HOST = torch.device("cpu")
TOKENS, SAMPLES = 10, 64


def states(tokens):
    side = torch.zeros(1, tokens, 2)
    return States([side], [side], torch.zeros(tokens, 4))


def build_samples(shared=0):
    ids = torch.arange(SAMPLES * TOKENS).view(SAMPLES, TOKENS)
    ids[:, :shared] = torch.arange(shared)
    return list(ids)


def share_found(kept, samples, epochs):
    """The share of tokens that are found in each epoch, shuffled."""
    shares = []
    for epoch in range(epochs):
        order = torch.randperm(
            len(samples), generator=torch.Generator().manual_seed(epoch)
        )
        found = 0
        for number in order.tolist():
            ids = samples[number]
            done = sum(piece.tokens for piece in kept.find(0, ids))
            if done < len(ids):
                kept.add(0, ids, states(len(ids) - done))
            found += done
            assert kept.bytes <= kept.limit
        shares.append(found / (len(samples) * TOKENS))
    return shares


@pytest.mark.parametrize("times", [1, 2, 4, 16])
def test_of_samples_beyond_the_limit_those_that_fit_are_found(times):
    size = states(TOKENS).bytes
    kept = KeptStates(size * SAMPLES // times, HOST)
    first, *later = share_found(kept, build_samples(), 6)
    assert first == 0
    # An eighth of a full tree is for what a training step may use again.
    expected = 1 if times == 1 else 0.875 / times
    for share in later:
        assert share == pytest.approx(expected, abs=0.02)


def test_what_a_step_has_added_to_a_full_tree_is_found_by_its_other_forwards():
    """Such as a reference's, of samples that are met once."""
    kept = KeptStates(states(TOKENS).bytes * 16, HOST)
    for batch in torch.arange(400 * TOKENS).view(200, 2, TOKENS):
        for forward in range(3):
            for ids in batch:
                done = sum(piece.tokens for piece in kept.find(0, ids))
                assert done == (TOKENS if forward else 0)
                if not forward:
                    kept.add(0, ids, states(TOKENS))
        assert kept.bytes <= kept.limit


def test_what_all_samples_share_stays_where_their_own_tokens_do_not_fit():
    shared = TOKENS // 2
    kept = KeptStates(states(TOKENS).bytes * SAMPLES // 8, HOST)
    _, *later = share_found(kept, build_samples(shared), 4)
    assert min(later) >= 0.5


def test_other_data_take_the_place_of_what_is_no_longer_met():
    kept = KeptStates(states(TOKENS).bytes * SAMPLES, HOST)
    share_found(kept, build_samples(), 2)
    others = [ids + 10_000 for ids in build_samples()]
    assert share_found(kept, others, 80)[-1] > 0.9


def test_without_a_limit_nothing_is_kept():
    kept = KeptStates(0, HOST)
    assert share_found(kept, build_samples(), 2) == [0, 0]
    assert len(kept) == kept.bytes == 0
