import pytest

from axolotl_reft.prompts.positions import Positions


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
