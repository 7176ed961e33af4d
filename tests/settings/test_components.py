"""Components other than a layer's output: against pyreft, and under checkpointing."""

import pyreft
import pytest
import torch
from conftest import HIDDEN, build_adapter, build_model
from peft import PeftModel
from transformers import LlamaConfig

from axolotl_reft import LoreftConfig
from axolotl_reft.exchange.objects import make_pyreft_object
from axolotl_reft.settings.components import (
    COMPONENTS,
    component_layer,
    find_site,
    from_pyreft_name,
)
from axolotl_reft.tuner.layer import LoreftDecoderLayer

PROMPT = 9
WIDTHS = {"mlp_activation": 48, "key_output": 16, "value_output": 16}
PATHS = {
    "mlp_output": "mlp.output",
    "query_output": "self_attn.q_proj.output",
    "attention_value_output": "self_attn.o_proj.input",
}


@pytest.fixture
def ids(tokens):
    return tokens(1, PROMPT + 3)


def with_labels(ids):
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "labels": labels}


def edited_layers(model):
    return [m for m in model.modules() if isinstance(m, LoreftDecoderLayer)]


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_component_agrees_with_pyreft(ids, component, tied):
    ours = build_adapter(
        build_model(), component=component, layers=[1], tied_weights=tied, rank=2
    )
    (layer,) = edited_layers(ours)
    mine = [c["default"] for c in (layer.intv_0, layer.intv_1) if "default" in c]
    assert [one.hidden_size for one in mine] == [WIDTHS.get(component, HIDDEN)] * (
        1 if tied else 2
    )
    yours = [make_pyreft_object("loreft", one, None, 0.0) for one in mine]
    representations = [
        {"layer": 1, "component": component, "low_rank_dimension": 2,
         "intervention": one} for one in yours
    ]  # fmt: skip
    theirs = pyreft.get_reft_model(
        build_model(), pyreft.ReftConfig(representations=representations),
        set_device=False,
    )  # fmt: skip
    theirs.set_device("cpu")
    prefix, suffix = [0, 1], [6, 7, 8]
    locations = [[prefix + suffix]] if tied else [[prefix], [suffix]]
    batch = with_labels(ids)
    got = ours(**batch)
    _, expected = theirs(
        {"input_ids": ids},
        unit_locations={"sources->base": (None, locations)},
        labels=batch["labels"],
    )
    assert torch.allclose(got.logits, expected.logits, atol=1e-5)
    with torch.no_grad(), ours.disable_adapter():
        assert (ours(**batch).logits - got.logits).abs().max() > 1e-4
    got.loss.backward()
    expected.loss.backward()
    for one, other in zip(mine, yours, strict=True):
        weight = other.learned_source.weight
        assert torch.allclose(one.weight.grad, weight.grad, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", list(PATHS))
def test_a_path_is_the_same_as_the_name(ids, name):
    by_name = build_adapter(build_model(), component=name, layers=[1])
    by_path = build_adapter(build_model(), component=PATHS[name], layers=[1])
    module, _, side = PATHS[name].rpartition(".")
    whole = f"model.layers[1].{module}.{side}"
    by_whole_path = build_adapter(build_model(), component=whole)
    expected = by_name(ids).logits
    assert torch.equal(by_path(ids).logits, expected)
    assert torch.equal(by_whole_path(ids).logits, expected)


@pytest.mark.parametrize(
    "component", ["mlp_output", "attention_input", "value_output", "block_input"]
)
def test_every_architecture_that_has_it_reloads_and_generates(
    tmp_path, tokens, architecture, component
):
    if component == "value_output" and architecture in ("gpt2", "gpt_neox", "phi3"):
        with pytest.raises(ValueError, match="component: 'value_output' is not in"):
            build_adapter(build_model(architecture), component=component)
        return
    model = build_adapter(build_model(architecture), component=component)
    prompt = tokens(1, PROMPT)
    expected = model(prompt).logits
    with model.disable_adapter():
        assert (model(prompt).logits - expected).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model(architecture), tmp_path)
    assert torch.equal(loaded(prompt).logits, expected)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(prompt, **settings),
        model.generate(prompt, use_cache=False, **settings),
    )


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_replays_the_edits_of_its_own_forward(
    tokens, component, use_reentrant
):
    batch = with_labels(tokens(2, PROMPT + 3))
    model = build_adapter(build_model(), component=component).train()

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients(model(**batch).loss)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    loss = model(**batch).loss
    other = tokens(3, 7, seed=1)
    with torch.no_grad():  # other prompts, other positions
        model(other, labels=other.where(torch.arange(7) > 2, -100))
    got = gradients(loss)
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_unloading_and_deleting_take_the_hooks_away(ids):
    base = build_model()
    expected = base(ids).logits
    model = build_adapter(base, component="mlp_output")
    mlp = edited_layers(model)[0].base_layer.mlp
    assert len(mlp._forward_hooks) == 1
    model.add_adapter("same", LoreftConfig(component="mlp_output"))
    assert len(mlp._forward_hooks) == 1
    model.delete_adapter("same")
    assert len(mlp._forward_hooks) == 1
    model.add_adapter("other", LoreftConfig(component="mlp_input"))
    assert len(mlp._forward_pre_hooks) == 1
    model.delete_adapter("other")
    assert not mlp._forward_pre_hooks
    unloaded = model.unload()
    assert not mlp._forward_hooks
    assert torch.equal(unloaded(ids).logits, expected)


@pytest.mark.parametrize(
    "text",
    ["mlp", "mlp.down_proj", ".output", "output", "mlp..output", "a b.output",
     "model.layers[x].output", "../mlp.output", None, 3],
)  # fmt: skip
def test_what_is_no_component(text):
    assert from_pyreft_name(text) is None


def test_the_layer_that_a_path_names():
    assert component_layer("model.layers[15].mlp.output") == 15
    assert component_layer("transformer.h[2].output") == 2
    assert component_layer("mlp.output") is None
    assert component_layer("mlp_output") is None


def test_a_module_that_is_not_there():
    layer = build_model().model.layers[0]
    with pytest.raises(ValueError, match="'mlp.up.output' is not in LlamaDecoderLayer"):
        find_site("mlp.up.output", layer, LlamaConfig())
    with pytest.raises(ValueError, match="which has self_attn, mlp, input_layernorm"):
        find_site("attn.output", layer, LlamaConfig())
