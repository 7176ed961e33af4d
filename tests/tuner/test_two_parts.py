"""A forward in two parts is the plain one: loss, logits and all gradients."""

import pytest
import torch
from conftest import LAYERS, build_adapter, build_model
from frozen_prompts import (
    assert_same_in_two_parts,
    packed,
    ragged,
)

from axolotl_reft.settings.spec import INTERVENTIONS

RAGGED = ragged([20, 17, 9, 13], [14, 10, 4, 12])
LEFT = ragged([20, 17, 9, 13], [14, 10, 4, 12], left=True)
# The last row of two samples, and an end that is padded.
PACKED = packed([(15, 10), (18, 12), (7, 2)], [(20, 16), (9, 5)])
BATCHES = {"right padding": RAGGED, "left padding": LEFT, "packed": PACKED}


def trained(architecture="llama", adapter=None, **overrides):
    base = build_model(architecture, **overrides)
    return build_adapter(base, **{"positions": "l3"} | (adapter or {})).train()


@pytest.fixture(scope="module")
def llama():
    return trained()


@pytest.mark.parametrize("batch", list(BATCHES))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_in_every_form_of_batch(llama, batch, attention):
    llama.set_attn_implementation(attention)
    assert_same_in_two_parts(llama, BATCHES[batch])


WINDOWS = {
    "mistral": {"sliding_window": 5},
    "gemma3_text": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen2": {
        "sliding_window": 5,
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
    "gpt_neox": {},
    "phi3": {},
    "qwen3": {},
    "mixtral": {},
    "qwen3_moe": {},
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", list(WINDOWS))
def test_on_other_bases_with_windows_and_experts(architecture, attention):
    model = trained(architecture, **WINDOWS[architecture])
    model.set_attn_implementation(attention)
    assert_same_in_two_parts(model, *BATCHES.values())


@pytest.mark.parametrize("window", [1, 2, 3, 13, 14, 15])
def test_windows_about_the_length_of_a_preamble(window):
    model = trained("mistral", sliding_window=window)
    assert_same_in_two_parts(model, ragged([20, 17], [16, 10]), PACKED)


def test_learned_absolute_positions():
    base = build_model("gpt2")
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(base.config, name, 0.0)
    model = build_adapter(base, positions="l3").train()
    assert_same_in_two_parts(model, RAGGED, LEFT)


COMPONENTS = (
    "block_output",
    "block_input",
    "mlp_output",
    "mlp_activation",
    "attention_input",
    "attention_output",
    "attention_value_output",
    "mlp.down_proj.output",
    "self_attn.k_proj.output",
)


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_and_kind_of_checkpointing(component, checkpointing):
    model = trained(adapter={"component": component})
    if checkpointing != "none":
        reentrant = {"use_reentrant": checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(reentrant)
    assert_same_in_two_parts(model, RAGGED, PACKED)


@pytest.mark.parametrize("intervention", list(INTERVENTIONS))
def test_every_intervention(intervention):
    assert_same_in_two_parts(trained(adapter={"intervention": intervention}), RAGGED)


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": [LAYERS - 1]},
        {"layers": "1-2"},
        {"layers": [0]},
        {"tied_weights": False},
        {"rank": {0: 1, "all": 4}},
        {"act_fn": "gelu"},
        {"positions": "l1"},
        {"positions": "l12"},
        {"turns": "first"},
    ],
    ids=str,
)
def test_every_setting_of_an_adapter(settings):
    assert_same_in_two_parts(trained(adapter=settings), RAGGED, LEFT, PACKED)
