"""Hidden states behind the layers below the first edited one, kept between forwards."""

import pytest
import torch
from conftest import build_model
from frozen_prompts import ragged
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from axolotl_reft import LoreftConfig
from axolotl_reft.training.frozen_prompt import use_frozen_prompt
from axolotl_reft.tuner import frozen_prompt
from axolotl_reft.tuner.model import hooks_of

LENGTHS, PROMPTS = (20, 17, 9), (14, 10, 4)
SETTINGS = {
    "both ends": {"positions": "f3+l3"},
    "untied": {"positions": "f3+l3", "tied_weights": False},
    "every token": {"positions": "all"},
    "the beginning": {"positions": "f2"},
    "a module within": {"positions": "f3+l3", "component": "mlp_output"},
    "a layer's input": {"positions": "all", "component": "block_input"},
}


@pytest.fixture(autouse=True)
def without_the_rule(monkeypatch):
    """Tiny layers would never be worth it."""
    monkeypatch.setattr(frozen_prompt, "lower_saves_time", lambda *_: True)


def adapted(kind="llama", **settings):
    base = build_model(kind)
    torch.manual_seed(1)
    config = LoreftConfig(**{"layers": [1, 2], "rank": 4, **settings})
    return get_peft_model(base, config).train()


def batch(left=False):
    return ragged(LENGTHS, PROMPTS, left)


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), [
        p.grad.clone() for p in model.parameters() if p.requires_grad
    ]


def calls_of(module):
    """Note what a module computes from now on."""
    seen = []
    module.register_forward_hook(lambda m, args, output: seen.append(args[0].shape))
    return seen


def assert_as_whole(model, inputs):
    expected_loss, expected = gradients(model, inputs)
    lowest = model.get_base_model().base_model.layers[0]
    use_frozen_prompt(model)
    computed, counts = calls_of(lowest.mlp), []
    for _ in range(3):
        loss, got = gradients(model, inputs)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
        counts.append(len(computed))
    use_frozen_prompt(model, False)
    return counts


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_is_that_of_the_whole_and_the_lower_layers_run_once(settings, left):
    first, *later = assert_as_whole(adapted(**settings), batch(left))
    assert first > 0
    assert later == [first, first]


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant):
    model = adapted(positions="f3+l3")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert len(set(assert_as_whole(model, batch()))) == 1


def test_packed_samples_are_kept_each_by_itself():
    model = adapted(positions="f3+l3")
    ids_BT = torch.randint(3, 60, (1, 40))
    labels_BT = ids_BT.clone()
    labels_BT[:, :10] = labels_BT[:, 15:27] = -100
    positions_BT = torch.cat([torch.arange(15), torch.arange(25)])[None]
    inputs = {"input_ids": ids_BT, "position_ids": positions_BT, "labels": labels_BT}
    assert_as_whole(model, {**inputs, "use_cache": False})
    use_frozen_prompt(model)
    gradients(model, {**inputs, "use_cache": False})
    kept = hooks_of(model.get_base_model()).frozen_prompt.kept
    assert len(kept) == 2
    assert kept.bytes == 40 * model.config.hidden_size * 4


def test_layers_that_return_several_vectors_a_token_are_computed_as_a_whole():
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "pad_token_id": 0, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0,
        "layer_types": ["full_attention"] * 4, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3n_text", **settings)
    base = AutoModelForCausalLM.from_config(config)
    component = {"positions": "f3+l3", "component": "mlp_output"}
    model = get_peft_model(base, LoreftConfig(layers=[2, 3], **component)).train()
    assert_as_whole(model, batch())


def test_no_gradients_reach_below_when_all_layers_are_edited():
    model, told = adapted(positions="f3+l3", layers="all"), []
    use_frozen_prompt(model, tell=told.append)
    assert hooks_of(model.get_base_model()).frozen_prompt is None
    assert told == [
        "frozen prompt: computed with the rest, since positions: f3+l3 edits the "
        "prompt's beginning"
    ]
