"""axolotl's commands with an adapter, as far as they go without loading a model.

In this process: a start of axolotl takes many seconds.
"""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from axolotl.cli.config import load_cfg
from axolotl.cli.main import cli
from axolotl.cli.utils.train import generate_config_files
from axolotl.integrations.base import PluginManager
from click.testing import CliRunner
from workspace import build_config, build_workspace

import axolotl_reft
from axolotl_reft.plugin import commands, plugin
from axolotl_reft.plugin.args import LoreftBlock
from axolotl_reft.plugin.commands import reft

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "commands.md").read_text()
REFUSED = {
    "merge-lora": "a LoReFT adapter cannot be merged into the base model",
    "quantize": "output_dir holds only an adapter",
    "vllm-serve": "it serves base_model and loads no adapter",
    "merge-sharded-fsdp-weights": "final_state_dict_type: FULL_STATE_DICT",
}
NO_BLOCK = "no loreft: block in the config: positions: f7+l7, rank: 8, layers: all"
# With axolotl's own launcher these would start a process of their own.
LAUNCHED = ("train", "evaluate", "inference", "merge-sharded-fsdp-weights")


@pytest.fixture
def config(tmp_path):
    """A config whose output_dir holds what a training might have left."""
    path = build_workspace(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "debug.log"):
        (out / name).write_text("kept")
    return path


def run(monkeypatch, command, *arguments):
    """``axolotl command …`` in this process; the exception it ended with."""
    launcher = ["--launcher", "python"] * (command in LAUNCHED)
    line = [command, *map(str, arguments), *launcher]
    monkeypatch.setattr(sys, "argv", ["axolotl", *line])
    return CliRunner().invoke(cli, line).exception


def contents(directory):
    return {
        path: path.read_bytes() for path in directory.rglob("*") if path.is_file()
    } | {path: b"" for path in directory.rglob("*") if path.is_dir()}


@pytest.mark.parametrize("command", REFUSED)
def test_a_refused_command_says_why_and_writes_nothing(config, command, monkeypatch):
    before = contents(config.parent)
    error = run(monkeypatch, command, config)
    assert isinstance(error, ValueError) and REFUSED[command] in str(error)
    assert contents(config.parent) == before


def test_the_refusal_of_vllm_serve_has_the_command_to_use(tmp_path, monkeypatch):
    config = build_config(tmp_path, loreft={"rank": {"0-1": 4, "all": 12}})
    error = str(run(monkeypatch, "vllm-serve", config))
    base, out = (shlex.quote(str(tmp_path / name)) for name in ("base", "out"))
    serve = f"vllm serve {base} --enforce-eager --enable-lora"
    assert f"{serve} --lora-target-modules loreft" in error
    assert error.endswith(f"--max-lora-rank 16 --lora-modules out={out}")
    config = build_config(tmp_path, rl="grpo")
    error = str(run(monkeypatch, "vllm-serve", config))
    assert "\nVLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve" in error
    assert error.endswith("--max-lora-rank 8 --logprobs-mode processed_logprobs")


def test_it_is_refused_in_the_launchers_process_too(config, monkeypatch):
    module = "axolotl.cli.merge_sharded_fsdp_weights"
    monkeypatch.setattr(sys, "argv", ["merge_sharded_fsdp_weights.py", str(config)])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ValueError, match="FULL_STATE_DICT"):
        runpy.run_module(module, run_name="__main__")


def test_without_the_adapter_axolotl_decides(config, monkeypatch):
    build_config(config.parent, adapter=None, loreft=None, output_dir=str(config))
    settings = yaml.safe_load(config.read_text())
    del settings["adapter"], settings["loreft"]
    settings["output_dir"] = str(config.parent / "elsewhere")
    config.write_text(yaml.safe_dump(settings))
    error = run(monkeypatch, "quantize", config)
    assert "No quantization configuration found" in str(error)


@pytest.mark.parametrize("command", ["train", "evaluate", "inference"])
@pytest.mark.parametrize("option", ["--loreft.rank=2", "--loreft__rank=2"])
def test_settings_of_the_block_are_not_lost_on_the_command_line(
    config, monkeypatch, command, option
):
    error = run(monkeypatch, command, config, option)
    name = option.split("=")[0]
    assert str(error).startswith(f"{name}: axolotl's command line does not pass on")
    assert "python -m axolotl.cli.train config.yml --loreft__rank=2" in str(error)


def test_the_way_named_there_works(config, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", str(config), "--loreft__rank=2"])
    assert load_cfg(str(config), loreft__rank=2).loreft.rank == 2


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (None, [NO_BLOCK]),
        ({"rank": 2}, []),
    ],
)
def test_a_training_without_a_block_tells_its_settings(
    config, monkeypatch, block, told
):
    lines = []
    monkeypatch.setattr(
        plugin.LOG, "info", lambda form, *some: lines.append(form % some)
    )
    cfg = load_cfg(str(build_config(config.parent, loreft=block)))
    PluginManager.get_instance().pre_model_load(cfg)
    assert lines == told


@pytest.mark.parametrize(
    "sweep",
    [
        {"loreft": [{"rank": 2, "positions": "l1"}, {"rank": 4, "positions": "l1"}]},
        {"loreft.rank": [2, 4], "loreft.positions": ["l1"]},
    ],
    ids=["blocks", "keys"],
)
def test_a_sweep_takes_keys_of_the_block_and_whole_blocks(config, sweep):
    file = config.parent / "sweep.yml"
    file.write_text(yaml.safe_dump(sweep))
    paths = [path for path, _ in generate_config_files(str(config), str(file))]
    loaded = [load_cfg(path) for path in paths]
    assert sorted(cfg.loreft.rank for cfg in loaded) == [2, 4]
    assert {cfg.loreft.positions for cfg in loaded} == {"l1"}
    assert len({cfg.output_dir for cfg in loaded}) == 2
    # Keys change the block, and whole blocks replace it.
    untied = "loreft" not in sweep
    assert {cfg.loreft.tied_weights for cfg in loaded} == {not untied}


def test_a_sweep_over_a_nested_block_is_told_how(config):
    """axolotl tries the block's keys as its values."""
    sweep = config.parent / "sweep.yml"
    sweep.write_text(yaml.safe_dump({"loreft": {"rank": [2, 4]}}))
    path, _ = next(generate_config_files(str(config), str(sweep)))
    message = "'rank' is not a block of settings"
    with pytest.raises(ValueError, match=message) as error:
        load_cfg(path)
    assert "for axolotl's --sweep write loreft.rank: [4, 8]" in str(error.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("loreft.rnak", "unknown key 'rnak'. Did you mean 'rank'"),
        ("reft.rank", "reft.rank: is not a key at the top of the config"),
    ],
)
def test_a_wrong_key_in_a_sweep_is_told(config, key, message):
    build_config(config.parent, **{key: 4})
    with pytest.raises(ValueError, match=message):
        load_cfg(str(config))


def test_a_key_of_a_block_that_is_none_is_told(config):
    build_config(config.parent, loreft=8, **{"loreft.rank": 4})
    with pytest.raises(ValueError, match="loreft.rank: loreft is 8, not a block of s"):
        load_cfg(str(config))


def test_preprocess_needs_no_weights_of_the_base(config, monkeypatch):
    (config.parent / "base" / "model.safetensors").unlink()
    assert run(monkeypatch, "preprocess", config) is None
    assert list((config.parent / "prepared").rglob("*.arrow"))


def test_preprocess_refuses_a_bad_block_before_the_data(config, monkeypatch):
    build_config(config.parent, loreft={"layers": "0-9"})
    error = run(monkeypatch, "preprocess", config)
    assert "layers: 9 in '0-9' is out of range" in str(error)
    assert not (config.parent / "prepared").exists()


def test_scoring_after_training_is_refused(config):
    plugins = ["axolotl_reft.LoreftPlugin", "axolotl.integrations.lm_eval.LMEvalPlugin"]
    settings = {"plugins": plugins, "lm_eval_tasks": ["arc_easy"]}
    build_config(config.parent, **settings)
    with pytest.raises(ValueError, match="run axolotl reft lm-eval config.yml"):
        load_cfg(str(config))
    build_config(config.parent, **settings, lm_eval_post_train=False)
    assert load_cfg(str(config)).adapter == "loreft"


@pytest.mark.parametrize("found", ["0.18.0", "0.20.0.dev0", "0.20.1"])
def test_another_axolotl_is_refused(config, monkeypatch, found):
    monkeypatch.setattr("axolotl_reft.plugin.version", lambda name: found)
    message = f"works with axolotl>=0.19,<0.20, and {found} is installed; pip install"
    with pytest.raises(ValueError, match=message):
        load_cfg(str(config))


def test_a_version_is_checked_before_modules_of_axolotl_are_imported(monkeypatch):
    """axolotl logs a plugin's ImportError and trains without it."""
    for name in list(sys.modules):
        if name.startswith(("axolotl.", "axolotl_reft.plugin.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("axolotl_reft.plugin.version", lambda name: "0.18.0")
    with pytest.raises(ValueError, match="0.18.0 is installed"):
        axolotl_reft.LoreftPlugin  # noqa: B018
    assert not [name for name in sys.modules if name.startswith("axolotl.")]


def test_scoring_without_lm_eval_says_what_to_install(config, monkeypatch):
    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    result = CliRunner().invoke(reft, ["lm-eval", str(config)])
    assert result.output == (
        "Error: lm_eval is not installed; pip install 'axolotl-reft[eval]'\n"
    )
    assert result.exit_code == 1


def test_the_schema_of_the_block(monkeypatch):
    schema = json.loads(CliRunner().invoke(reft, ["config-schema"]).output)
    assert list(schema["properties"]) == list(LoreftBlock.model_fields)
    assert schema["properties"]["rank"]["default"] == 8
    assert all(entry["description"] for entry in schema["properties"].values())
    assert schema["additionalProperties"] is False


def test_axolotls_schema_is_of_its_own_settings():
    output = CliRunner().invoke(cli, ["config-schema", "--field", "loreft"]).output
    assert "Unknown field: 'loreft'" in output


@pytest.mark.parametrize(
    "command",
    ["agent-docs", "delinearize-llama4", "fetch"] + ["generate-cli-config-options"],
)
def test_these_read_no_config(command):
    names = {option.name for option in cli.get_command(None, command).params}
    assert "config" not in names


ROWS = re.findall(r"^\| `axolotl (reft [\w-]+|[\w-]+).*?` \|(.*)\|$", TABLE, re.M)


def test_the_table_has_every_command():
    named = {name.removeprefix("reft ") for name, _ in ROWS if " " in name}
    assert (
        {"lm-eval", "config-schema", "export", "import", "sweep", "compare"}
        <= named
        <= set(reft.commands)
    )
    theirs = set(cli.list_commands(None)) - {"reft"}
    assert {name for name, _ in ROWS if " " not in name} == theirs


@pytest.mark.parametrize(("name", "rest"), ROWS)
def test_each_row_of_the_table_has_its_tests(name, rest):
    tests = re.findall(r"`([\w/]+\.py)::(\w+)`", rest)
    assert tests, f"{name} names no test"
    for file, test in tests:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text()
