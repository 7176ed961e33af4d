"""What is checked once the base model's config is known, before its weights are."""

import pytest
import torch
from axolotl.utils.dict import DictDefault
from axolotl.utils.fp32_norms import get_fp32_norm_patterns, tag_model_fp32_norms
from conftest import build_adapter, build_model
from transformers import AutoConfig

from axolotl_reft.plugin import against_base
from axolotl_reft.plugin.against_base import check_against_base
from axolotl_reft.plugin.args import LoreftBlock
from axolotl_reft.plugin.plugin import LoreftPlugin, trained_adapter


def check(block=None, hidden_size=32, layers=3, training=True, **settings):
    config = AutoConfig.for_model(
        "llama", hidden_size=hidden_size, num_hidden_layers=layers
    )
    block = LoreftBlock(**(block or {})).model_dump()
    block = {key: value for key, value in block.items() if value is not None}
    check_against_base(DictDefault({"loreft": block, **settings}), config, training)


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


SAVED = {"positions": "f2+l3"}


def named(setting, directory):
    """A config in which ``setting`` leads to the adapter in ``directory``."""
    if setting == "auto_resume_from_checkpoints":
        return {setting: True, "output_dir": str(directory.parent)}
    return {setting: str(directory)}


@pytest.fixture(
    params=["lora_model_dir", "resume_from_checkpoint", "auto_resume_from_checkpoints"]
)
def setting(request):
    return request.param


def test_saved_adapters_must_fit_the_base(tmp_path, setting):
    directory = tmp_path / "checkpoint-3"
    directory.mkdir()
    with pytest.raises(ValueError, match=f"{setting}: there is no readable adapter"):
        check(SAVED, **named(setting, directory))
    build_adapter(build_model(), **SAVED).save_pretrained(directory)
    check(SAVED, **named(setting, directory))
    with pytest.raises(
        ValueError, match=f"{setting}: .* hidden size 32, this base has"
    ):
        check(SAVED, hidden_size=64, **named(setting, directory))


def test_training_goes_on_with_the_same_settings_alone(tmp_path, setting):
    directory = tmp_path / "checkpoint-3"
    build_adapter(build_model(), **SAVED).save_pretrained(directory)
    changed = {"positions": "l1", "rank": 2}
    message = (
        rf"{setting}: .* has positions: f2\+l3 \(here l1\), rank: 8 \(here 2\); wri"
    )
    with pytest.raises(ValueError, match=message):
        check(changed, **named(setting, directory))


def test_an_answering_adapter_keeps_its_own_settings(tmp_path, monkeypatch):
    build_adapter(build_model(), **SAVED).save_pretrained(tmp_path)
    told = []
    monkeypatch.setattr(
        against_base.LOG, "warning", lambda *message: told.append(message)
    )
    check({"positions": "l1"}, training=False, lora_model_dir=str(tmp_path))
    assert "has positions: f2+l3 (here l1)" in told[0][1]
    check(SAVED, training=False, resume_from_checkpoint="nowhere")
    assert len(told) == 1


def test_the_adapter_of_the_output_directory(tmp_path):
    with pytest.raises(
        ValueError, match="output_dir: there is no trained LoReFT adapt"
    ):
        trained_adapter(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="train first with axolotl train"):
        trained_adapter(str(tmp_path))
    # As axolotl leaves it when a training begins.
    (tmp_path / "adapter_config.json").write_text("{}")
    checkpoint = tmp_path / "checkpoint-7"
    build_adapter(build_model()).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="did not finish: .* --lora-model-dir .*-7"):
        trained_adapter(str(tmp_path))
    build_adapter(build_model()).save_pretrained(tmp_path)
    assert trained_adapter(str(tmp_path)) == str(tmp_path)


def test_other_adapters_are_left_to_others():
    cfg = DictDefault({"adapter": "lora"})
    plugin = LoreftPlugin()
    assert plugin.load_adapter(None, cfg) is None
    assert plugin.load_datasets(cfg) is None
    assert plugin.pre_model_load(cfg) is None


def test_every_process_starts_with_the_same_numbers():
    """Whatever it has drawn before; the seed is the config's."""

    def start(drawn, **settings):
        cfg = DictDefault({"adapter": "loreft", "loreft": {"rank": 2}, **settings})
        base = build_model()
        torch.manual_seed(drawn)
        model, _ = LoreftPlugin().load_adapter(base, cfg)
        following = torch.rand(1).item()
        torch.manual_seed(drawn)
        assert torch.rand(1).item() == following
        return {k: v for k, v in model.state_dict().items() if ".intv_" in k}

    first, second, other = start(1), start(2), start(1, seed=3)
    assert all(torch.equal(second[key], value) for key, value in first.items())
    bases = [key for key in first if key.endswith("rotation_base")]
    assert bases and not any(torch.equal(other[key], first[key]) for key in bases)


def test_fsdp2_is_told_to_keep_interventions_in_float32():
    ours = "axolotl_reft.core.interventions.LoreftIntervention"
    plugin, model = LoreftPlugin(), torch.nn.Module()
    plugin.post_model_load(DictDefault({"adapter": "loreft"}), model)
    assert get_fp32_norm_patterns(model) is None
    plugin.post_model_load(DictDefault({"adapter": "lora", "fsdp_version": 2}), model)
    assert get_fp32_norm_patterns(model) is None
    cfg = DictDefault({"adapter": "loreft", "fsdp_version": 2})
    plugin.post_model_load(cfg, model)
    assert ours in get_fp32_norm_patterns(model)
    cfg = DictDefault({"adapter": "loreft", "fsdp_version": 2, "fp32_norms": True})
    plugin.post_model_load(cfg, torch.nn.Module())
    tag_model_fp32_norms(model, cfg)
    assert {ours, "RMSNorm", "LayerNorm"} <= set(get_fp32_norm_patterns(model))


def test_preference_trainers_get_the_config_alone():
    cfg = DictDefault({"adapter": "loreft", "loreft": LoreftBlock(rank=3).model_dump()})
    model, config = LoreftPlugin().load_adapter(None, cfg, config_only=True)
    assert model is None and config.rank == 3 and config.task_type == "CAUSAL_LM"
