import pytest

from axolotl_reft.prompts.positions import Positions
from axolotl_reft.settings.frozen_prompt import check_frozen_prompt, parse_kept_size


@pytest.mark.parametrize("value", ["auto", False])
@pytest.mark.parametrize("positions", ["l7", "f7", "f7+l7", "all"])
def test_auto_and_false_go_with_all_positions(value, positions):
    check_frozen_prompt(value, Positions.parse(positions))


def test_true_goes_with_the_last_tokens_alone():
    check_frozen_prompt(True, Positions.parse("l7"))
    for text in ("f7", "f7+l7", "all"):
        with pytest.raises(ValueError, match="true needs positions: l<m>") as error:
            check_frozen_prompt(True, Positions.parse(text))
        assert f"positions: {text} edits the beginning" in str(error.value)
        assert str(error.value).endswith("use frozen_prompt: auto, or l7")


@pytest.mark.parametrize("value", ["yes", "True", 1, 0, None, [], "Auto"])
def test_another_value_is_unknown(value):
    with pytest.raises(ValueError, match="is unknown; write auto, true or false"):
        check_frozen_prompt(value, Positions.parse("l7"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, (None, False)),
        (0, (0, False)),
        ("0", (0, False)),
        ("0GB", (0, False)),
        ("8GB", (8 * 10**9, False)),
        ("8 gb", (8 * 10**9, False)),
        ("1.5GB", (1_500_000_000, False)),
        ("100MB", (10**8, False)),
        ("2TB", (2 * 10**12, False)),
        ("3kb", (3000, False)),
        ({"host": "1GB"}, (10**9, False)),
        ({"device": "1GB"}, (10**9, True)),
        ({"device": None}, (None, True)),
        ({"device": 0}, (0, True)),
    ],
    ids=str,
)
def test_sizes(value, expected):
    assert parse_kept_size(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        *("8", 8, "8G", "8GiB", "-1GB", "", "GB", "1e3GB", "a lot", True, False),
        *(1.5, [], ["8GB"], {}, {"disk": "1GB"}, {"host": "1GB", "device": "1GB"}),
        {"device": "8"},
    ],
    ids=str,
)
def test_what_is_no_size_is_refused(value):
    with pytest.raises(ValueError, match="is not a size; write for example 8GB"):
        parse_kept_size(value)
