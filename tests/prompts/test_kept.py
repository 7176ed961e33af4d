"""What is kept of the beginnings of samples, against a dictionary of all of them."""

import copy
import random

import pytest
import torch

from axolotl_reft.prompts import kept as kept_states
from axolotl_reft.prompts.kept import KeptStates, States

LAYERS, HEADS, SIZE, WIDTH = 2, 2, 3, 5
# Bytes of a token, in float32.
TOKEN = 4 * (2 * LAYERS * HEADS * SIZE + WIDTH)
HOST = torch.device("cpu")


@pytest.fixture(autouse=True)
def soon_idle(monkeypatch):
    """Few lookups are enough for an edge to be idle."""
    monkeypatch.setattr(kept_states, "_IDLE", 4)


def state_of(ids, count):
    """Numbers of a beginning's last tokens, which depend on all of its ids."""
    ends = range(len(ids) - count + 1, len(ids) + 1)
    numbers = [random.Random(repr(ids[:end])).random() for end in ends]
    n_N1 = torch.tensor(numbers).reshape(-1, 1)
    k_KNH = n_N1 + torch.arange(HEADS * SIZE).view(HEADS, 1, SIZE)
    keys = [k_KNH + layer for layer in range(LAYERS)]
    values = [k_KNH - 10 - layer for layer in range(LAYERS)]
    return States(keys, values, n_N1 + torch.arange(WIDTH))


def array(ids):
    return torch.tensor(ids, dtype=torch.long)


def visit(kept, ids, root=0):
    """As a forward does; returns how many tokens were kept."""
    pieces = kept.find(root, array(ids))
    found = sum(states.tokens for states in pieces)
    if found:
        expected = state_of(ids[:found], found)
        for part in ("keys", "values"):
            got = [getattr(states, part) for states in pieces]
            for layer, tensor in enumerate(getattr(expected, part)):
                joined = torch.cat([tensors[layer] for tensors in got], 1)
                assert torch.equal(joined, tensor)
        hidden = torch.cat([states.hidden for states in pieces])
        assert torch.equal(hidden, expected.hidden)
    if found < len(ids):
        kept.add(root, array(ids), state_of(ids, len(ids) - found))
    return found


def edges(kept):
    below = [edge for root in kept._roots.values() for edge in root.values()]
    found = []
    while below:
        edge = below.pop()
        found.append(edge)
        below += edge.below.values()
    return found


def check(kept):
    """Everything that holds of a tree at any time."""
    assert kept.bytes <= kept.limit
    all_edges = edges(kept)
    assert set(all_edges) == set(kept._edges)
    assert len(all_edges) == len(kept)
    order = {edge: place for place, edge in enumerate(kept._edges)}
    total = 0
    for edge in all_edges:
        assert len(edge.ids) == edge.states.tokens > 0
        above = edge.above.below if edge.above else kept._roots[edge.root]
        assert above[int(edge.ids[0])] is edge
        if edge.above:
            assert order[edge.above] > order[edge]
            assert edge.above.used >= edge.used
        tensors = (*edge.states.keys, *edge.states.values, edge.states.hidden)
        total += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert kept.bytes == total, "nothing larger stands behind a view"


def beginnings(ids):
    return {tuple(ids[:end]) for end in range(1, len(ids) + 1)}


def random_ids(dice):
    """Few letters and doubled beginnings, so that many samples share one."""
    start = [dice.randrange(2) for _ in range(dice.randrange(4))] * 2
    return start + [dice.randrange(3) for _ in range(dice.randrange(1, 6))]


@pytest.mark.parametrize("seed", range(3))
def test_without_a_limit_it_is_a_dictionary_of_beginnings(seed):
    dice, known = random.Random(seed), {0: set(), 7: set()}
    kept = KeptStates(10**9, HOST)
    for _ in range(150):
        root, ids = dice.choice([0, 7]), random_ids(dice)
        longest = [n for n in range(len(ids) + 1) if tuple(ids[:n]) in known[root]]
        assert visit(kept, ids, root) == max(longest, default=0)
        known[root] |= beginnings(ids)
        assert kept.bytes == TOKEN * sum(map(len, known.values()))
        check(kept)


@pytest.mark.parametrize("tokens", [0, 4, 20, 60])
@pytest.mark.parametrize("seed", range(2))
def test_within_a_limit_what_is_found_is_right(seed, tokens):
    dice = random.Random(seed)
    kept = KeptStates(TOKEN * tokens + 3, HOST)
    removed = found = 0
    for step in range(300):
        # What is met drifts, so that some of it becomes idle.
        ids = [step // 60, *random_ids(dice)]
        before = set(kept._edges)
        found += visit(kept, ids)
        removed += len(before - set(kept._edges))
        check(kept)
    assert bool(found) == bool(tokens)
    assert bool(removed) == bool(tokens)


def test_several_samples_are_computed_before_any_is_added():
    dice = random.Random(0)
    kept = KeptStates(TOKEN * 30, HOST)
    for step in range(60):
        batch = [[step // 20, *random_ids(dice)] for _ in range(4)]
        found = [
            sum(states.tokens for states in kept.find(0, array(ids))) for ids in batch
        ]
        for ids, count in zip(batch, found, strict=True):
            if count < len(ids):
                kept.add(0, array(ids), state_of(ids, len(ids) - count))
            check(kept)
        for ids in batch:
            visit(kept, ids)


def test_a_full_tree_keeps_what_is_in_use():
    kept = KeptStates(TOKEN * 12, HOST)
    used = [[n] * 4 for n in (1, 2, 3)]
    for ids in used:
        visit(kept, ids)
    for step in range(50):  # new samples each time, and the known ones in turn
        assert visit(kept, [9, step]) == 0
        for ids in used:
            assert visit(kept, ids) == 4
    assert len(kept) == 3


def test_what_is_idle_makes_room_leaves_first():
    kept = KeptStates(TOKEN * 12, HOST)
    for end in ([5, 6], [7, 8]):
        visit(kept, [1, 2, 3, 4, *end])
    assert (len(kept), kept.bytes) == (3, 8 * TOKEN)
    visit(kept, [9] * 4)
    for _ in range(4 * len(kept)):
        visit(kept, [1, 2, 3, 4, 7, 8])
    visit(kept, [3] * 4)
    check(kept)
    assert visit(kept, [1, 2, 3, 4, 7, 8]) == 6
    # Gone are the idle leaf of 5 and, if need be, the sample of 9.
    assert 5 not in {int(edge.ids[0]) for edge in edges(kept)}
    assert visit(kept, [3] * 4) == 4


def test_samples_that_part_within_an_edge_share_its_beginning():
    kept = KeptStates(10**9, HOST)
    visit(kept, [1, 2, 3, 4])
    assert visit(kept, [1, 2, 5]) == 2
    assert visit(kept, [1, 2]) == 2
    assert len(kept) == 3
    assert visit(kept, [1, 2, 3, 4, 6]) == 4
    assert visit(kept, [2]) == 0
    check(kept)


def test_a_kept_state_is_nobodys_view():
    kept, states = KeptStates(10**9, HOST), state_of([1, 2, 3], 3)
    kept.add(0, array([1, 2, 3]), states)
    states.map(torch.Tensor.zero_)
    assert visit(kept, [1, 2, 3]) == 3


def test_a_copy_begins_empty():
    kept = KeptStates(10**9, HOST)
    visit(kept, [1, 2])
    other = copy.deepcopy(kept)
    assert (other.limit, other.device, len(other), other.bytes) == (10**9, HOST, 0, 0)
    kept.clear()
    assert (len(kept), kept.bytes, visit(kept, [1, 2])) == (0, 0, 0)


def test_states_behind_what_was_forgotten_meanwhile_are_not_kept():
    kept, ids = KeptStates(TOKEN * 100, HOST), [1, 2, 3, 4, 5]
    visit(kept, ids[:3])
    (piece,) = kept.find(0, array(ids))
    kept.clear()
    kept.add(0, array(ids), state_of(ids, len(ids) - piece.tokens))
    assert not kept.find(0, array(ids))
    assert visit(kept, ids) == 0
    assert visit(kept, ids) == 5
