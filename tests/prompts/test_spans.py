import pytest
import torch

from axolotl_reft.prompts.positions import Positions
from axolotl_reft.prompts.spans import any_in_sample, count_in_sample, prompt_spans


def edited_by_the_paper(length, positions):
    """The rule of pyreft's LoReftSupervisedDataset, one prompt at a time."""
    first = min(length // 2, positions.first)
    last = min(length // 2, positions.last)
    return list(range(first)), list(range(length - last, length))


@pytest.mark.parametrize("text", ["f7+l7", "f1+l1", "f3", "l1", "l9", "f2+l5"])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 14, 15, 30])
def test_short_prompts_truncate_as_in_the_paper(length, text):
    positions = Positions.parse(text)
    spans = prompt_spans(torch.ones(1, length, dtype=torch.bool))
    prefix, suffix = spans.edited(positions)
    got = prefix[0].nonzero().flatten().tolist(), suffix[0].nonzero().flatten().tolist()
    assert got == edited_by_the_paper(length, positions)


def test_the_example_of_five_tokens():
    spans = prompt_spans(torch.ones(1, 5, dtype=torch.bool))
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
    spans = prompt_spans(real, None, answer)
    assert drawn(spans, Positions(2, 1), 11) == ["ff...l.....", "...ff...l.."]


def test_packed_samples_have_a_prompt_each():
    real, start, answer = rows(
        "ppppaa|ppppppa|ppa|ppp",
        "ppa|pppppppppaaa|pppp|",
    )
    spans = prompt_spans(real, start, answer)
    assert drawn(spans, Positions(2, 2), 19) == [
        "ffll..ff..ll.fl.f.l",
        "fl.ff.....ll...ffll",
    ]


def test_later_turns_are_not_part_of_the_first_prompt():
    real, _, answer = rows("ppppaauuuuaa")
    assert drawn(prompt_spans(real, None, answer), Positions(1, 1), 12) == [
        "f..l........"
    ]


def test_a_sample_without_prompt_is_not_edited():
    real, _, answer = rows("aaaa")
    assert drawn(prompt_spans(real, None, answer), Positions(2, 2), 4) == ["...."]


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
    spans = prompt_spans(real, start, answer, every=True)
    assert drawn(spans, Positions(1, 1), len(expected)) == [expected]


def test_columns_of_a_row_keep_their_places_in_the_prompt():
    spans = prompt_spans(torch.ones(1, 9, dtype=torch.bool))
    whole = drawn(spans, Positions(3, 2), 9)
    chunks = ""
    for start, stop in ((0, 4), (4, 8), (8, 9)):
        chunk = spans.columns(start, stop)
        chunks += drawn(chunk, Positions(3, 2), stop - start)[0]
    assert [chunks] == whole
    beyond = spans.columns(7, 12)
    assert drawn(beyond, Positions(3, 2), 5) == ["ll..."]


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
