"""What is checked once the base model's config is known, before its weights are."""

import pytest
from axolotl.utils.dict import DictDefault
from conftest import build_adapter, build_model
from transformers import AutoConfig

from axolotl_reft.plugin.args import LoreftBlock
from axolotl_reft.plugin.checks import check_against_base
from axolotl_reft.plugin.plugin import LoreftPlugin, _trained_adapter


def check(block=None, hidden_size=32, layers=3, **settings):
    config = AutoConfig.for_model(
        "llama", hidden_size=hidden_size, num_hidden_layers=layers
    )
    block = LoreftBlock(**(block or {})).model_dump()
    check_against_base(DictDefault({"loreft": block, **settings}), config)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"layers": [3]},
            "layers: 3 in .* is out of range, the base model has 3 layers",
        ),
        ({"layers": "1-5"}, "layers: 5 in '1-5' is out of range"),
        ({"rank": 33}, "rank: 33 is larger than the base model's hidden size 32"),
    ],
)
def test_what_does_not_fit_the_base(block, message):
    with pytest.raises(ValueError, match=message):
        check(block)


@pytest.mark.parametrize("setting", ["lora_model_dir", "resume_from_checkpoint"])
def test_saved_adapters_must_fit_the_base(tmp_path, setting):
    with pytest.raises(ValueError, match=f"{setting}: there is no readable adapter"):
        check(**{setting: str(tmp_path)})
    build_adapter(build_model()).save_pretrained(tmp_path)
    check(**{setting: str(tmp_path)})
    with pytest.raises(
        ValueError, match=f"{setting}: .* hidden size 32, this base has"
    ):
        check(hidden_size=64, **{setting: str(tmp_path)})


def test_the_adapter_of_the_output_directory(tmp_path):
    with pytest.raises(
        ValueError, match="output_dir: there is no trained LoReFT adapt"
    ):
        _trained_adapter(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="train first with axolotl train"):
        _trained_adapter(str(tmp_path))
    checkpoint = tmp_path / "checkpoint-7"
    build_adapter(build_model()).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="with --lora-model-dir .*checkpoint-7"):
        _trained_adapter(str(tmp_path))
    build_adapter(build_model()).save_pretrained(tmp_path)
    assert _trained_adapter(str(tmp_path)) == str(tmp_path)


def test_other_adapters_are_left_to_others():
    cfg = DictDefault({"adapter": "lora"})
    plugin = LoreftPlugin()
    assert plugin.load_adapter(None, cfg) is None
    assert plugin.load_datasets(cfg) is None
    assert plugin.pre_model_load(cfg) is None


def test_preference_trainers_get_the_config_alone():
    cfg = DictDefault({"adapter": "loreft", "loreft": LoreftBlock(rank=3).model_dump()})
    model, config = LoreftPlugin().load_adapter(None, cfg, config_only=True)
    assert model is None and config.rank == 3 and config.task_type == "CAUSAL_LM"
