"""Samples of a batch and their first edited tokens, written as pictures.

``.`` is padding, ``-`` a token, ``e`` an edited one, ``a`` one of an answer, ``E`` an
edited one of an answer; ``|`` stands before the first token of a packed sample.
"""

import pytest
import torch

from axolotl_reft.prompts.samples import Sample, split_samples


def split(*rows, answers=True):
    pictures = [row.replace("|", "") for row in rows]

    def mask(letters):
        return torch.tensor([[c in letters for c in row] for row in pictures])

    starts = None
    if any("|" in row for row in rows):
        starts = torch.zeros(len(rows), len(pictures[0]), dtype=torch.bool)
        for number, row in enumerate(rows):
            parts = row.split("|")
            for n in range(1, len(parts)):
                starts[number, len("".join(parts[:n]))] = True
    answer = mask("aE") if answers else None
    found = split_samples(mask("eE"), mask("-eaE"), starts, answer)
    return None if found is None else [tuple(sample) for sample in found]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["--eaa"], [(0, 0, 2, 5)]),
        (["--eaa..", "----eea"], [(0, 0, 2, 5), (1, 0, 4, 7)]),
        (["..--eaa", "----eea"], [(0, 2, 4, 7), (1, 0, 4, 7)]),
        # Another turn.
        (["-ea--ea"], [(0, 0, 1, 7)]),
        # A prompt of one token has no edit, and nothing before it.
        (["-aa"], [(0, 0, 0, 3)]),
        (["eaa"], [(0, 0, 0, 3)]),
        (["|--ea|---eaa"], [(0, 0, 2, 4), (0, 4, 7, 10)]),
        (["|--ea|-aa|-ea"], [(0, 0, 2, 4), (0, 4, 4, 7), (0, 7, 8, 10)]),
        # Nothing of a sample is trained, as of the padded end of a packed row.
        (["|--ea|---"], [(0, 0, 2, 4)]),
        (["|--ea|-|-|-"], [(0, 0, 2, 4)]),
        (["-----"], []),
        ([".....", "--eaa"], [(1, 0, 2, 5)]),
        # A row that goes on with a sample that began before it.
        (["--ea|--ea"], [(0, 0, 2, 4), (0, 4, 6, 8)]),
    ],
    ids=str,
)
def test_samples_and_their_first_edited_columns(rows, expected):
    assert split(*rows) == expected


@pytest.mark.parametrize("row", ["-.-ea", "--e.a", "--.ea"])
def test_padding_within_a_sample_has_no_two_parts(row):
    assert split(row) is None


def test_without_answers_no_sample_is_left_out():
    assert split("-----", "--e--", answers=False) == [(0, 0, 0, 5), (1, 0, 2, 5)]


def test_a_sample_names_its_columns():
    assert Sample._fields == ("row", "begin", "split", "end")
