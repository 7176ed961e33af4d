import json
from pathlib import Path

import pytest
from conftest import HIDDEN, LAYERS, build_adapter, build_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from axolotl_reft.saved.directory import check_adapter_fits


@pytest.fixture
def saved(tmp_path):
    build_adapter(build_model(), rank=2).save_pretrained(tmp_path)
    return tmp_path


def check(directory, hidden_size=HIDDEN, layers=LAYERS):
    return check_adapter_fits(str(directory), "lora_model_dir", hidden_size, layers)


def test_an_adapter_that_fits_gives_its_config(saved):
    assert check(saved).rank == 2


def test_missing(tmp_path):
    with pytest.raises(
        ValueError, match="lora_model_dir: there is no readable adapter in .*nowhere"
    ):
        check(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match="a run's output_dir or a checkpoint-N below it"
    ):
        check(tmp_path)


def test_another_method(tmp_path):
    lora = get_peft_model(build_model(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is LORA, not LOREFT; name one that was"):
        check(tmp_path)


def test_another_hidden_size(saved):
    with pytest.raises(ValueError, match="of hidden size 32, this base has 48"):
        check(saved, hidden_size=48)


@pytest.mark.parametrize("layers", [2, 4])
def test_another_number_of_layers(saved, layers):
    with pytest.raises(ValueError, match=r"holds layers \[0, 1, 2\], but on this base"):
        check(saved, layers=layers)


def test_damaged(saved):
    weights = Path(saved / "adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="weights .* are missing or damaged"):
        check(saved)
    weights.unlink()
    with pytest.raises(ValueError, match="weights .* are missing or damaged"):
        check(saved)


def change(saved, changed):
    file = saved / "adapter_model.safetensors"
    save_file(changed(load_file(file)), file)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            lambda key, t: {k: v for k, v in t.items() if k != key},
            "lora_model_dir: '.*': missing tensor 'layers.1.intv_0.weight' in "
            "adapter_model.safetensors; save the adapter again, or load another",
        ),
        (
            lambda key, t: t | {key: t[key][:1].clone()},
            r"tensor 'layers.1.intv_0.weight' in adapter_model.safetensors has shape "
            r"\(1, 32\), expected \(2, 32\); save",
        ),
        (
            lambda key, t: t | {key: t[key] * float("nan")},
            "tensor 'layers.1.intv_0.weight' of adapter_model.safetensors has NaN or",
        ),
        (
            lambda key, t: t | {key.replace("_0", "_1"): t[key].clone()},
            "unexpected tensor 'layers.1.intv_1.weight' in adapter_model.safetensors",
        ),
    ],
)
def test_tensors_that_are_not_the_adapters_are_named(saved, changed, message):
    key = "base_model.model.model.layers.1.intv_0.weight"
    change(saved, lambda tensors: changed(key, tensors))
    with pytest.raises(ValueError, match=message):
        check(saved)


def test_settings_that_are_no_settings(saved):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"positions": "f0"}))
    with pytest.raises(ValueError, match="positions: 'f0' is not understood"):
        check(saved)
    file.write_text("{")
    with pytest.raises(ValueError, match="there is no readable adapter"):
        check(saved)
