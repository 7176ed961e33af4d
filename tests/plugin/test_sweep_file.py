"""Files of settings to try: what they combine to, how runs are named, mistakes."""

import pytest
import yaml

from axolotl_reft.plugin.sweep_file import PLUGIN, read_sweep

BASE = {
    "base_model": "base",
    "adapter": "loreft",
    "loreft": {"positions": "f7+l7", "rank": 8},
    "output_dir": "out",
    "learning_rate": 9e-4,
}


def read(directory, sweep, **base):
    config, file = directory / "config.yml", directory / "sweep.yml"
    config.write_text(yaml.safe_dump(BASE | base))
    file.write_text(sweep if isinstance(sweep, str) else yaml.safe_dump(sweep))
    return read_sweep(str(config), str(file))


def names(runs):
    return [run.directory.name for run in runs]


@pytest.mark.parametrize(
    "block",
    ["loreft.positions: [l1, f7+l7]", "loreft: {positions: [l1, f7+l7]}"],
)
def test_keys_of_the_block_are_combined_with_others(tmp_path, block):
    runs = read(tmp_path, f"{block}\nlearning_rate: [9e-4, 0.002]")
    assert names(runs) == [
        "positions=l1,learning_rate=9e-4",
        "positions=l1,learning_rate=0.002",
        "positions=f7+l7,learning_rate=9e-4",
        "positions=f7+l7,learning_rate=0.002",
    ]
    first = runs[0].config
    assert first["loreft"] == {"positions": "l1", "rank": 8}
    assert first["learning_rate"] == "9e-4" and first["base_model"] == "base"
    assert first["output_dir"] == "out/positions=l1,learning_rate=9e-4"
    assert runs[2].config["loreft"] == BASE["loreft"]
    assert runs[0].settings == {"loreft.positions": "l1", "learning_rate": "9e-4"}


def test_a_block_is_made_where_the_config_has_none(tmp_path):
    runs = read(tmp_path, "loreft.lora.r: [2, 4]", loreft=None)
    assert [run.config["loreft"] for run in runs] == [
        {"lora": {"r": 2}},
        {"lora": {"r": 4}},
    ]


def test_whole_blocks_come_before_keys_within_them(tmp_path):
    runs = read(tmp_path, "loreft.rank: [2, 4]\nloreft: [{positions: l1}]")
    blocks = [run.config["loreft"] for run in runs]
    assert blocks == [{"positions": "l1", "rank": 2}, {"positions": "l1", "rank": 4}]


def test_settings_that_belong_together_are_not_combined(tmp_path):
    runs = read(
        tmp_path,
        "seed: [1, 2]\n_:\n- {adapter: lora, loreft: null, lora_r: 8}\n"
        "- {loreft.rank: 4}",
    )
    assert names(runs)[:2] == [
        "seed=1,adapter=lora,loreft=null,lora_r=8",
        "seed=1,rank=4",
    ]
    assert runs[0].config["loreft"] is None and runs[0].config["lora_r"] == 8


def test_a_setting_that_all_runs_share_is_not_in_their_names(tmp_path):
    runs = read(tmp_path, "max_steps: [40]\nseed: [1, 2]")
    assert names(runs) == ["seed=1", "seed=2"]
    assert [run.config["max_steps"] for run in runs] == [40, 40]
    assert runs[0].varying == ["seed"]
    assert names(read(tmp_path, "max_steps: [40]")) == ["max_steps=40"]


def test_names_are_parts_of_paths_and_differ(tmp_path):
    runs = read(tmp_path, "loreft.layers: [all, '1-3', [1, 3], [/, 3], 'x y/z']")
    found = names(runs)
    assert found[:2] == ["layers=all", "layers=1-3"]
    assert len(set(found)) == 5 and not any("/" in name for name in found)
    assert found[2].startswith("layers=1-3~")
    long = names(read(tmp_path, {"chat_template_jinja": ["a" * 300, "a" * 299]}))
    assert len(set(long)) == 2 and all(len(name) < 255 for name in long)


def test_equal_last_parts_are_told_apart(tmp_path):
    runs = read(tmp_path, "loreft.rank: [1]\n_: [{a.rank: 1}, {loreft.rank: 2}]")
    assert names(runs) == ["loreft.rank=1,a.rank=1", "loreft.rank=2"]


def test_every_run_has_the_plugin_that_records_it(tmp_path):
    (run,) = read(tmp_path, "seed: [1]", plugins=["another.Plugin"])
    assert run.config["plugins"] == ["another.Plugin", PLUGIN]
    (run,) = read(tmp_path, "seed: [1]", plugins=[PLUGIN])
    assert run.config["plugins"] == [PLUGIN]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("seed: 3", "SWEEP: seed: 3 is not a list of values to try; write seed: .3."),
        ("seed: []", "SWEEP: seed: .. is not a list of values .*; write at least one"),
        ("loreft: {rank: 4}", "SWEEP: loreft.rank: 4 is not a list of values to try"),
        ("output_dir: [a, b]", "SWEEP: output_dir: each run has a directory below"),
        ("_: {seed: 1}", "SWEEP: _: .* is not a list of settings that belong together"),
        ("_: []", "SWEEP: .* names no setting; write for example\nlearning_rate"),
        ("{}", "SWEEP: .* names no setting"),
        ("- 1", "SWEEP: .* holds no settings, but .1."),
        ("a: [", "SWEEP: .* cannot be read"),
        ("seed: [1, 1]", "SWEEP: two runs have the same settings: seed=1"),
        ("base_model.x: [1]", "base_model.x: base_model is 'base', not a block of"),
    ],
)
def test_mistakes_are_told(tmp_path, sweep, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, sweep)


def test_a_missing_config_is_told(tmp_path):
    with pytest.raises(ValueError, match="CONFIG: .*none.yml' cannot be read"):
        read_sweep(str(tmp_path / "none.yml"), str(tmp_path / "none.yml"))
