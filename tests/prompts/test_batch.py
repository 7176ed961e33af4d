"""Prompts of batches with labels, where the marks of turns say something else."""

import pytest
import torch

from axolotl_reft.prompts.batch import answered_spans, labelled_spans
from axolotl_reft.prompts.turns import Turns

# A question is 10 … 11, its answer ends with 9, a tool's result is 20 … 21.
OPEN, CLOSE, END = 10, 11, 9
MISTRAL = {"generation_prompts": [[CLOSE]], "end_of_turn": [END]}
# With tools: an answer that no mark announces, once in the middle and once at the end.
TOOLS = [OPEN, 1, CLOSE, 2, END, 20, 3, 21, 4, 5, END]
GOES_ON = [*TOOLS, OPEN, 6, CLOSE, 7, 8, END]


def batch(ids, trained, starts=()):
    ids = torch.tensor([ids])
    labels = torch.full_like(ids, -100)
    labels[0, list(trained)] = ids[0, list(trained)]
    found = {"input_ids": ids, "labels": labels}
    if starts:
        ends = [*starts[1:], ids.shape[1]]
        places = [torch.arange(b - a) for a, b in zip(starts, ends, strict=True)]
        found["position_ids"] = torch.cat(places)[None]
    return found


def turns(markers=None, every=True):
    return Turns.parse("every" if every else "first", markers or MISTRAL)


def prompts(spans):
    return spans.inside_BT[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("ids", [TOOLS, GOES_ON])
@pytest.mark.parametrize("packed", [False, True])
def test_a_trained_answer_that_no_mark_announces_stops_training(ids, packed):
    found = batch(ids, [8, 9, 10])
    if packed:
        plain = [OPEN, 1, CLOSE, 2, END]
        found = batch(plain + ids, [3, 4, 13, 14, 15], [0, 5])
    column = 13 if packed else 8
    with pytest.raises(ValueError, match="turn_markers: the labels train tokens") as e:
        labelled_spans(found, turns())
    assert f"row 0, column {column} of a batch: token ids [4, 5, 9" in str(e.value)
    assert "after [" in str(e.value) and "20, 3, 21]" in str(e.value)
    assert "turns: first or positions: all" in str(e.value)


def test_it_is_never_prompt_where_nobody_can_wait():
    """In a forward, whose later batches are not looked at on the host."""
    found = batch(GOES_ON, [8, 9, 10])
    real = torch.ones_like(found["input_ids"]).bool()
    answer = found["labels"] != -100
    spans = answered_spans(turns(), found["input_ids"], real, None, answer)
    assert prompts(spans) == [0, 1, 2, 5, 6, 7, 11, 12, 13]
    with pytest.raises(ValueError, match="turn_markers: the labels train"):
        answered_spans(turns(), found["input_ids"], real, None, answer, checks=True)


def test_a_second_mark_sets_it_right():
    both = {**MISTRAL, "generation_prompts": [[CLOSE], [21]]}
    spans = labelled_spans(batch(GOES_ON, [8, 9, 10, 14, 15, 16]), turns(both))
    assert prompts(spans) == [0, 1, 2, 5, 6, 7, 11, 12, 13]


def test_the_first_turn_alone_has_no_later_answers():
    spans = labelled_spans(batch(GOES_ON, [3, 8, 9, 10]), turns(every=False))
    assert prompts(spans) == [0, 1, 2]


@pytest.mark.parametrize(
    ("ids", "trained", "expected"),
    [
        # answers that are not trained, or whose end is not
        ([OPEN, 1, CLOSE, 2, END, OPEN, 3, CLOSE, 4, END], [8], [0, 1, 2, 5, 6, 7]),
        # cut off within an answer
        ([OPEN, 1, CLOSE, 2, 2], [3, 4], [0, 1, 2]),
        # no mark at all: the labels alone
        ([5, 1, 2, 2, END], [3, 4], [0, 1, 2]),
        # a line break behind the end, trained as TRL does: a part of the next prompt
        (
            [OPEN, 1, CLOSE, 2, END, 7, OPEN, 3, CLOSE, 4, END, 7],
            [3, 4, 5, 9, 10, 11],
            [0, 1, 2, 5, 6, 7, 8, 11],
        ),
        # what a template closes the last answer with, such as Phi's <|endoftext|>
        ([OPEN, 1, CLOSE, 2, END, 7, END], [3, 4, 6], [0, 1, 2, 5]),
        ([OPEN, 1, CLOSE, 2, END, 7, 7], [3, 4, 5, 6], [0, 1, 2]),
    ],
)
def test_labels_that_agree_with_the_marks(ids, trained, expected):
    assert prompts(labelled_spans(batch(ids, trained), turns())) == expected


def test_two_answers_in_a_row_stop_training_where_the_conversation_goes_on():
    ids = [OPEN, 1, CLOSE, 2, END, 3, 4, END, OPEN, 5, CLOSE, 6, END]
    with pytest.raises(ValueError, match="turn_markers: the labels train"):
        labelled_spans(batch(ids, [3, 4, 5, 6, 7, 11, 12]), turns())


def test_an_end_within_a_generation_prompt_ends_nothing():
    """As gpt-oss announces an answer behind its thought."""
    marks = {"generation_prompts": [[CLOSE], [END, CLOSE]], "end_of_turn": [END]}
    ids = [OPEN, 1, CLOSE, 2, END, CLOSE, 3, END, OPEN, 4, CLOSE, 5, END]
    answer, _ = turns(marks).answers(torch.tensor([ids]))
    assert answer[0].nonzero().flatten().tolist() == [3, 4, 5, 6, 7, 11, 12]
    answer, _ = turns().answers(torch.tensor([ids]))
    assert answer[0].nonzero().flatten().tolist() == [3, 4, 6, 7, 11, 12]
