"""Runs side by side: what differs, in which order, as text, JSON and picture."""

import json

import pytest
from click.testing import CliRunner
from compared_runs import finish, save_lora, save_loreft, swept, write_json
from PIL import Image

from axolotl_reft.compare import command
from axolotl_reft.compare.command import compare, short_names
from axolotl_reft.compare.plot import figure, x_axis
from axolotl_reft.compare.runs import find_runs
from axolotl_reft.compare.settings import plain
from axolotl_reft.compare.text import columns
from axolotl_reft.plugin.commands import reft


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three trainings of LoReFT at two rates and positions, and one of LoRA."""
    root = tmp_path_factory.mktemp("compare")
    for name, positions, rate, scale in [
        ("first", "l3", "1e-3", 2.0),
        ("second", "l3", 0.01, 0.5),
        ("third", "f2+l2", 0.01, 1.0),
    ]:
        out = save_loreft(root / name, positions=positions)
        finish(out, scale=scale, learning_rate=rate)
    lora = {"adapter": "lora", "loreft": None, "lora_r": 2, "learning_rate": 0.002}
    finish(save_lora(root / "lora"), scale=1.5, **lora)
    return root


@pytest.fixture
def found(root):
    return compare(find_runs([str(root)]))


def invoke(*arguments):
    return CliRunner().invoke(reft, ["compare", *map(str, arguments)])


def test_the_lowest_loss_of_an_evaluation_comes_first(found):
    assert short_names(found.runs) == ["second", "third", "lora", "first"]
    assert found.sort == "eval_loss" and found.warning == ""


def test_settings_that_differ_are_told_and_not_those_of_another_method(found):
    assert found.differing == ["method", "positions", "rank", "learning_rate"]
    assert found.same["layers"] == "all" and found.same["lora_alpha"] == 8
    assert found.same["base_model"] == "base"


def test_a_setting_that_one_run_lacks_differs(tmp_path):
    finish(save_loreft(tmp_path / "a"))
    finish(save_loreft(tmp_path / "b", act_fn="relu"), seed=3)
    found = compare(find_runs([str(tmp_path)]))
    assert found.differing == ["act_fn", "seed"]
    table = columns(found)
    assert table["act_fn"] == ["", "relu"] and table["seed"] == ["", "3"]


def test_the_table_has_what_was_found(found):
    table = columns(found)
    assert table["run"] == ["second", "third", "lora", "first"]
    assert table["positions"] == ["l3", "f2+l2", "", "l3"]
    assert table["learning_rate"] == ["0.01", "0.01", "0.002", "0.001"]
    assert table["eval_loss"] == ["3", "6", "9", "12"]
    assert table["time"] == ["1:23"] * 4
    assert table["parameters"] == ["780", "780", "672", "780"]
    assert "state" not in table and "best_eval_loss" not in table
    assert table["size"][0].endswith("kB")


@pytest.mark.parametrize(
    ("column", "order"),
    [
        ("learning_rate", ["first", "lora", "second", "third"]),
        ("positions", ["third", "first", "second", "lora"]),
        ("parameters", ["lora", "first", "second", "third"]),
        ("eval_ppl", ["second", "third", "lora", "first"]),
    ],
)
def test_runs_are_sorted_by_any_column_and_those_without_it_last(root, column, order):
    sorted_by = compare(find_runs([str(root)]), column)
    assert short_names(sorted_by.runs) == order


def test_of_scores_the_highest_is_the_best(root):
    for name, score in (("first", 0.25), ("lora", 0.75), ("third", 0.5)):
        results = {"results": {"letters": {"acc,none": score}}}
        write_json(root / name / "scores.json", results)
    try:
        order = short_names(compare(find_runs([str(root)]), "letters acc").runs)
        assert order == ["lora", "third", "first", "second"]
    finally:
        for file in root.glob("*/scores.json"):
            file.unlink()


def test_an_unknown_column_is_told_with_those_there_are(root):
    result = invoke(root, "--sort", "eval_los")
    assert result.exit_code == 1
    assert "no column 'eval_los'. Did you mean 'eval_loss'? Columns: param" in (
        result.output
    )


def test_without_evaluations_the_training_loss_sorts(tmp_path):
    for name, scale in (("a", 2.0), ("b", 1.0)):
        out = finish(save_loreft(tmp_path / name), steps=1, scale=scale)
        state = json.loads((out / "trainer_state.json").read_text())
        assert not any("eval_loss" in entry for entry in state["log_history"])
    found = compare(find_runs([str(tmp_path)]))
    assert found.sort == "mean_loss" and short_names(found.runs) == ["b", "a"]


def test_losses_of_other_data_are_not_compared_in_silence(tmp_path):
    finish(save_loreft(tmp_path / "a"))
    finish(save_loreft(tmp_path / "b"), datasets=[{"path": "other.jsonl"}])
    result = invoke(tmp_path)
    assert "The runs differ in datasets: their losses are means over other" in (
        result.output
    )


def test_runs_that_did_not_end_say_so_and_come_last(tmp_path):
    finish(save_loreft(tmp_path / "a"))
    swept(tmp_path / "b", "failed", error="ValueError: wrong")
    table = columns(compare(find_runs([str(tmp_path)])))
    assert table["state"] == ["finished", "failed: ValueError: wrong"]
    assert table["eval_loss"] == ["6", ""]


def test_json_is_valid_where_a_loss_is_no_number(root, tmp_path):
    finish(save_loreft(tmp_path / "a"), scale=float("nan"))
    result = invoke(root, tmp_path, "--json")
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert [run["eval_loss"] for run in found["runs"]] == [3, 6, 9, 12, None]
    assert found["differing"][0] == "method" and found["sort"] == "eval_loss"
    assert found["runs"][0]["lower_is_better"] == ["eval_ppl"]


def test_notes_are_printed_with_the_runs_name(tmp_path):
    finish(save_loreft(tmp_path / "a"), steps=5)
    assert "a: eval_loss is of step 4 of 5" in invoke(tmp_path).output


def test_a_picture_is_drawn(root, tmp_path):
    file = tmp_path / "runs.png"
    result = invoke(root, "--plot", file)
    assert result.output.endswith(f"wrote {file}\n")
    with Image.open(file) as image:
        assert image.size[0] > 1000
    assert "--plot: 'x.gif' does not end with" in invoke(root, "--plot", "x.gif").output


def test_the_picture_has_a_line_for_each_of_the_other_settings(found):
    assert x_axis(found) == "learning_rate"
    curves, column = figure(found).axes
    assert [text.get_text() for text in curves.get_legend().get_texts()] == [
        "second", "third", "lora", "first"
    ]  # fmt: skip
    lines = {line.get_label(): line.get_xydata().tolist() for line in column.lines}
    assert lines == {
        "method LOREFT, positions l3, rank 4": [[0.001, 12], [0.01, 3]],
        "third": [[0.01, 6]],
        "lora": [[0.002, 9]],
    }
    assert column.get_xscale() == "log" and column.get_ylabel() == "eval_loss"


def test_long_names_leave_room_for_the_lines(tmp_path):
    for number in range(10):
        name = f"a_run_with_a_long_name_{number}={'x' * 80}"
        others = {f"other_setting_{n}": f"{number}-{n}" for n in range(20)}
        finish(save_loreft(tmp_path / name), learning_rate=number + 1, **others)
    drawing = figure(compare(find_runs([str(tmp_path)])))
    drawing.draw_without_rendering()
    assert all(axis.get_position().width > 0.3 for axis in drawing.axes)
    lines = drawing.axes[1].lines
    names = [f"a_run_with_a_long_name_{n}={'x' * 34}…" for n in range(10)]
    assert sorted(line.get_label() for line in lines) == names
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 10


def test_a_run_alone_has_its_name_and_not_all_its_settings(tmp_path):
    for name, rate, seed in (("a", 0.1, 1), ("b", 0.2, 1), ("c", 0.1, 2)):
        finish(save_loreft(tmp_path / name), learning_rate=rate, seed=seed)
    lines = figure(compare(find_runs([str(tmp_path)]))).axes[1].lines
    assert [line.get_label() for line in lines] == ["seed 1", "c"]


def test_settings_that_change_no_result_are_not_compared(tmp_path):
    finish(save_loreft(tmp_path / "a"), debug=False, shard=False)
    finish(save_loreft(tmp_path / "b"), debug_num_examples=3)
    assert compare(find_runs([str(tmp_path)])).differing == []


def test_without_a_number_that_differs_parameters_are_the_axis(root):
    runs = [r for r in find_runs([str(root)]) if r.directory.endswith("d")]
    found = compare(runs)
    assert found.differing == ["positions"] and x_axis(found) == "parameters"
    assert figure(found).axes[1].get_xlabel() == "parameters"


def test_a_missing_extra_is_named(root, monkeypatch):
    monkeypatch.setattr("axolotl_reft.inspect.command.find_spec", lambda name: None)
    output = invoke(root).output
    assert "compare: rich is not installed; run pip install 'axolotl-reft[ins" in output
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    lines = []
    monkeypatch.setattr("builtins.print", lines.append)
    command.show(["a", "b"])
    assert lines[0].endswith("then axolotl reft compare a b")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1e-3", 0.001),
        (8.0, 8),
        ("8-15", "8-15"),
        (True, True),
        ([3, 18, 9], "3, 18, 9"),
        (["v", "q"], "q, v"),
        ([{"path": "a", "type": "t"}, {"path": "b"}], "a, b"),
        ({"r": 8, "a": "1"}, "a: 1, r: 8"),
    ],
)
def test_equal_settings_are_written_alike(value, expected):
    assert plain(value) == expected
