import pytest

from axolotl_reft.core.tensors import SavedKey, adapter_of, parse_saved_key


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            "base_model.model.model.layers.3.intv_0.weight",
            SavedKey("model.layers", 3, 0, "weight"),
        ),
        ("base_model.model.h.12.intv_1.bias", SavedKey("h", 12, 1, "bias")),
        (
            "base_model.model.model.layers.0.intv_lora.q_proj_A",
            SavedKey("model.layers", 0, None, "q_proj_A"),
        ),
        ("base_model.model.model.layers.3.intv_0.default.weight", None),
        ("base_model.model.model.layers.3.intv_2.weight", None),
        ("base_model.model.lm_head.weight", None),
        ("model.layers.3.intv_0.weight", None),
    ],
)
def test_a_key_of_a_file(key, expected):
    assert parse_saved_key(key) == expected


@pytest.mark.parametrize(
    ("key", "adapter"),
    [
        ("base_model.model.model.layers.3.intv_0.default.weight", "default"),
        ("model.layers.3._orig_mod.intv_lora.my-own.q_proj_A", "my-own"),
        ("model.layers.3.intv_0.weight", None),
        ("model.layers.3.base_layer.mlp.up_proj.weight", None),
    ],
)
def test_a_key_of_a_model(key, adapter):
    assert adapter_of(key) == adapter
