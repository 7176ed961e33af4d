import pytest
import torch

from axolotl_reft.prompts.positions import Positions
from axolotl_reft.prompts.spans import edit_indices, flat_indices, prompt_spans


def test_indices_with_slots_are_those_that_counting_finds():
    mask = torch.rand(5, 13, generator=torch.Generator().manual_seed(0)) < 0.3
    counted = flat_indices(mask)
    reserved = flat_indices(mask, slots=40)
    assert counted.tolist() == mask.flatten().nonzero().flatten().tolist()
    assert reserved[: len(counted)].tolist() == counted.tolist()
    assert set(reserved[len(counted) :].tolist()) == {mask.numel()}
    assert flat_indices(torch.zeros(2, 3, dtype=torch.bool)).tolist() == []


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("text", ["f2+l3", "f3+l1", "f2", "l2", "f20+l20"])
@pytest.mark.parametrize("width", [1, 2, 13])
def test_reserved_indices_are_those_of_the_masks(text, width, packed):
    """In random rows, some prompts of which end where the next one begins."""
    positions = Positions.parse(text)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        real, answer, starts = torch.rand(3, 6, width, generator=generator).lt(
            torch.tensor([0.9, 0.3, 0.2]).view(3, 1, 1)
        )
        spans = prompt_spans(real, starts if packed else None, answer, every=True)
        prompts = int((spans.inside_BT & (spans.place_BT == 0)).sum())
        sides = zip(
            (positions.first, positions.last), spans.edited(positions), strict=True
        )
        expected = [(count, flat_indices(mask)) for count, mask in sides if count]
        for spare in (0, 3):
            found = edit_indices(spans, positions, False, prompts + spare)
            assert found.may_be_unused
            for side, (count, indices) in zip(found.sides, expected, strict=True):
                assert len(side) == min(count * (prompts + spare), real.numel())
                used = side[side < real.numel()]
                assert torch.equal(used, indices)
                assert set(side.tolist()) <= {*indices.tolist(), real.numel()}


def test_only_the_rows_that_are_meant_have_indices():
    spans = prompt_spans(torch.ones(3, 6, dtype=torch.bool))
    rows = torch.tensor([[True], [False], [True]])
    found = edit_indices(spans, Positions(1, 1), True, rows_B1=rows)
    assert [side.tolist() for side in found.sides] == [[0, 5, 12, 17]]
    assert not found.may_be_unused
