import pytest
import torch

from axolotl_reft.prompts.positions import (
    Positions,
    any_in_sample,
    count_in_sample,
    flat_indices,
    prompt_runs,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f7", Positions(7, 0)),
        ("l1", Positions(0, 1)),
        ("f7+l7", Positions(7, 7)),
        ("f10+l3", Positions(10, 3)),
        ("all", Positions(everywhere=True)),
    ],
)
def test_grammar_reads_and_writes(text, expected):
    assert Positions.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    ["", "f7-l7", "f0", "l0", "l-1", "f7+", "+l7", "f7l7", "l7+f7", "f", "7", "F7",
     "f7 + l7", "f07", "all+l1", None, 7, True, ["f7"]],
)  # fmt: skip
def test_what_is_no_position_is_refused_with_the_grammar(text):
    with pytest.raises(ValueError, match=r"positions: .* is not understood") as error:
        Positions.parse(text)
    assert repr(text) in str(error.value)
    assert "f7+l7" in str(error.value)


def edited_by_the_paper(length, positions):
    """The rule of pyreft's LoReftSupervisedDataset, one prompt at a time."""
    first = min(length // 2, positions.first)
    last = min(length // 2, positions.last)
    return list(range(first)), list(range(length - last, length))


@pytest.mark.parametrize("text", ["f7+l7", "f1+l1", "f3", "l1", "l9", "f2+l5"])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 14, 15, 30])
def test_short_prompts_truncate_as_in_the_paper(length, text):
    positions = Positions.parse(text)
    spans = prompt_runs(torch.ones(1, length, dtype=torch.bool)).spans()
    prefix, suffix = spans.edited(positions)
    got = prefix[0].nonzero().flatten().tolist(), suffix[0].nonzero().flatten().tolist()
    assert got == edited_by_the_paper(length, positions)


def test_the_example_of_five_tokens():
    spans = prompt_runs(torch.ones(1, 5, dtype=torch.bool)).spans()
    prefix, suffix = spans.edited(Positions(7, 7))
    assert prefix.tolist() == [[True, True, False, False, False]]
    assert suffix.tolist() == [[False, False, False, True, True]]


def rows(*texts):
    """Rows drawn as text: p prompt, a answer, u a later turn, ' ' padding, | start."""
    masks = {"real": [], "start": [], "answer": []}
    for text in texts:
        real, start, answer, begins = [], [], [], True
        for char in text:
            if char == "|":
                begins = True
                continue
            real.append(char != " ")
            start.append(begins)
            answer.append(char == "a")
            begins = False
        for name, row in zip(masks, (real, start, answer), strict=True):
            masks[name].append(row)
    return [torch.tensor(mask) for mask in masks.values()]


def drawn(spans, positions, width):
    prefix, suffix = spans.edited(positions)
    return [
        "".join(
            "f" if prefix[b, t] else "l" if suffix[b, t] else "." for t in range(width)
        )
        for b in range(prefix.shape[0])
    ]


def test_padding_on_either_side_moves_the_edit_along():
    real, _, answer = rows("ppppppaa   ", "   ppppppaa")
    spans = prompt_runs(real, None, answer).spans()
    assert drawn(spans, Positions(2, 1), 11) == ["ff...l.....", "...ff...l.."]


def test_packed_samples_have_a_prompt_each():
    real, start, answer = rows(
        "ppppaa|ppppppa|ppa|ppp",
        "ppa|pppppppppaaa|pppp|",
    )
    spans = prompt_runs(real, start, answer).spans()
    assert drawn(spans, Positions(2, 2), 19) == [
        "ffll..ff..ll.fl.f.l",
        "fl.ff.....ll...ffll",
    ]


def test_later_turns_are_not_part_of_the_first_prompt():
    real, _, answer = rows("ppppaauuuuaa")
    assert drawn(prompt_runs(real, None, answer).spans(), Positions(1, 1), 12) == [
        "f..l........"
    ]


def test_a_sample_without_prompt_is_not_edited():
    real, _, answer = rows("aaaa")
    assert drawn(prompt_runs(real, None, answer).spans(), Positions(2, 2), 4) == [
        "...."
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # what stands between answers, and after the last, are prompts of their own
        ("ppppaauuuuaauu", "f..l..f..l..fl"),
        # of one token nothing is edited
        ("ppaauaauu", "fl.....fl"),
        # samples packed into one row, the second begins with an answer
        ("ppaapp|aapppa|ppa", "fl..fl..f.l.fl."),
        ("   ppaapp  ", "   fl..fl  ".replace(" ", ".")),
    ],
)
def test_every_turn_has_a_prompt_of_its_own(row, expected):
    real, start, answer = rows(row)
    spans = prompt_runs(real, start, answer, every=True).spans()
    assert drawn(spans, Positions(1, 1), len(expected)) == [expected]


def test_columns_of_a_row_keep_their_places_in_the_prompt():
    spans = prompt_runs(torch.ones(1, 9, dtype=torch.bool)).spans()
    whole = drawn(spans, Positions(3, 2), 9)
    chunks = ""
    for start, stop in ((0, 4), (4, 8), (8, 9)):
        chunk = spans.columns(start, stop)
        chunks += drawn(chunk, Positions(3, 2), stop - start)[0]
    assert [chunks] == whole
    beyond = spans.columns(7, 12)
    assert drawn(beyond, Positions(3, 2), 5) == ["ll..."]


def test_indices_with_a_capacity_are_those_that_counting_finds():
    mask = torch.rand(5, 13, generator=torch.Generator().manual_seed(0)) < 0.3
    counted = flat_indices(mask)
    reserved = flat_indices(mask, capacity=40)
    assert counted.tolist() == mask.flatten().nonzero().flatten().tolist()
    assert reserved[: len(counted)].tolist() == counted.tolist()
    assert set(reserved[len(counted) :].tolist()) == {mask.numel()}
    assert flat_indices(torch.zeros(2, 3, dtype=torch.bool)).tolist() == []


def test_counts_of_samples_are_those_that_a_loop_finds():
    generator = torch.Generator().manual_seed(0)
    mask, starts = torch.rand(2, 40, 9, generator=generator) < 0.4
    counts = torch.zeros(40, 9, dtype=torch.long)
    found = torch.zeros(40, 9, dtype=torch.bool)
    for row in range(40):
        ends = [*starts[row].nonzero().flatten().tolist(), 9]
        for start, stop in zip([0, *ends], ends, strict=False):
            own = mask[row, start:stop].long()
            counts[row, start:stop] = own.cumsum(0)
            found[row, start:stop] = own.any()
    assert torch.equal(count_in_sample(mask, starts), counts)
    assert torch.equal(any_in_sample(mask, starts), found)
    assert torch.equal(count_in_sample(mask, None), mask.long().cumsum(1))
    assert torch.equal(any_in_sample(mask, None), mask.any(1, True).expand(40, 9))


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
        runs = prompt_runs(real, starts if packed else None, answer, every=True)
        spans = runs.spans()
        prompts = int((spans.inside_BT & (spans.rank_BT == 0)).sum())
        sides = zip(
            (positions.first, positions.last), spans.edited(positions), strict=True
        )
        expected = [(count, flat_indices(mask)) for count, mask in sides if count]
        for spare in (0, 3):
            got = runs.reserved_indices(positions, prompts + spare)
            for side, (count, indices) in zip(got, expected, strict=True):
                assert len(side) == count * (prompts + spare)
                used = side[side < real.numel()].sort().values
                assert torch.equal(used, indices)
                assert set(side.tolist()) <= {*indices.tolist(), real.numel()}
