"""Recomputed and offloaded activations: the gradients are those of a plain step.

Between forward and backward another batch goes through, with prompts elsewhere.
"""

import contextlib
from functools import partial, wraps

import pytest
import torch
from axolotl.monkeypatch.checkpoint_activation_offload import (
    get_checkpoint_hidden_states_offloading_ctx_manager,
)
from axolotl.monkeypatch.selective_checkpointing import apply_selective_checkpointing
from axolotl.utils.dict import DictDefault
from conftest import LAYERS, build_adapter, build_model
from torch import nn
from transformers import AutoConfig, GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from axolotl_reft.plugin import checkpointing
from axolotl_reft.plugin.args import LoreftBlock
from axolotl_reft.plugin.checkpointing import keep_shared_keys_and_values
from axolotl_reft.plugin.plugin import LoreftPlugin

ADAPTERS = {
    "block_output": {"dropout": 0.2},
    "inside": {"component": "mlp_output", "dropout": 0.2},
    "inside, untied": {"component": "value_output", "tied_weights": False},
    "everywhere": {"positions": "all", "component": "attention_output"},
}


def checkpoint(model, **kwargs):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return contextlib.nullcontext()


def selective(model):
    apply_selective_checkpointing(model.get_base_model(), save=["attention"])
    return checkpoint(model.get_base_model(), use_reentrant=False)


def hidden_states(model):
    checkpoint(model, use_reentrant=False)
    return get_checkpoint_hidden_states_offloading_ctx_manager(use_streams=False)


def offload(model):
    """What TRL's offloader does, which starts on an accelerator alone."""
    return torch.autograd.graph.save_on_cpu()


WAYS = {
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "selective": selective,
    "activation_offloading: hidden_states": hidden_states,
    "activation_offloading: true": offload,
}


def batch(tokens, rows, columns, prompt, seed=0):
    ids = tokens(rows, columns, seed)
    labels = ids.where(torch.arange(columns) >= prompt, -100)
    return {"input_ids": ids, "labels": labels}


def gradients(model, tokens, context=None):
    model.zero_grad()
    torch.manual_seed(3)
    with context or contextlib.nullcontext():
        loss = model(**batch(tokens, 2, 12, prompt=7)).loss
        with torch.no_grad():
            model(**batch(tokens, 3, 7, prompt=4, seed=1))
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_alike(got, expected):
    assert list(got) == list(expected)
    for name in expected:
        # On an AMD EPYC the last bits differ under reentrant checkpointing.
        scale = float(expected[name].abs().max())
        assert (got[name] - expected[name]).abs().max() <= 1e-5 * scale, name
        assert expected[name].any(), name


@pytest.fixture(params=list(ADAPTERS))
def model(request):
    return build_adapter(build_model(), **ADAPTERS[request.param]).train()


@pytest.mark.parametrize("way", list(WAYS))
def test_gradients_are_those_of_a_plain_step(model, tokens, way):
    expected = gradients(model, tokens)
    assert_alike(gradients(model, tokens, WAYS[way](model)), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_inside_a_layers_own_forward(
    model, tokens, monkeypatch, use_reentrant
):
    """As transformers does it from 5.23 on, where ``__call__`` is not checkpointed."""
    expected = gradients(model, tokens)
    forward = LlamaDecoderLayer.forward

    @wraps(forward)
    def checkpointed(self, *args, **kwargs):
        if not (self.gradient_checkpointing and self.training):
            return forward(self, *args, **kwargs)
        function = partial(forward, self, **kwargs)
        calls.append(self)
        return self._gradient_checkpointing_func(function, *args)

    calls = []
    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", nn.Module.__call__)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", checkpointed)
    checkpoint(model, use_reentrant=use_reentrant)
    assert_alike(gradients(model, tokens), expected)
    assert len(calls) == LAYERS * 2


def loaded_by_axolotl(block, **settings):
    """A base as axolotl hands it to the plugin, and what that makes of it."""
    base = build_model()
    base.enable_input_require_grads()
    cfg = DictDefault(
        {"adapter": "loreft", "loreft": LoreftBlock(**block).model_dump()}
    )
    model, _ = LoreftPlugin().load_adapter(base, cfg | DictDefault(settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    return model.train()


def reached(model, tokens):
    """The layers whose output a backward pass goes through, lowest first."""
    backbone = model.get_base_model().model
    needed = {}

    def note(number, module, args):
        needed.setdefault(number, args[0].requires_grad)

    # What comes after a layer tells: a layer's own hooks run within its checkpoint.
    for number, module in enumerate([*backbone.layers[1:], backbone.norm]):
        module.register_forward_pre_hook(partial(note, number))
    got = gradients(model, tokens)
    assert all(gradient.any() for gradient in got.values())
    assert not model.get_input_embeddings().weight.requires_grad
    return [number for number in sorted(needed) if needed[number]]


@pytest.mark.parametrize("use_reentrant", [None, True, False])
@pytest.mark.parametrize("component", ["block_output", "block_input", "mlp_output"])
def test_backward_stops_at_the_first_edited_layer(tokens, component, use_reentrant):
    block = {"layers": [1], "positions": "f2+l2", "component": component}
    settings = {}
    if use_reentrant is not None:
        settings = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
        }
    model = loaded_by_axolotl(block, **settings)
    if settings:
        checkpoint(model, use_reentrant=use_reentrant)
    assert reached(model, tokens) == [1, 2]


@pytest.mark.parametrize("trained", [True, False])
def test_other_trained_weights_keep_the_gradient_they_need(tokens, trained):
    """Reentrant checkpointing gives none to a weight in the lowest layer otherwise."""
    model = build_adapter(build_model(), layers=[1]).train()
    weight = model.get_base_model().model.layers[0].mlp.up_proj.weight
    weight.requires_grad_(trained)
    checkpoint(model, use_reentrant=True)
    assert reached(model, tokens) == ([0, 1, 2] if trained else [1, 2])
    assert (weight.grad is not None) == trained


def test_an_unloaded_base_is_as_before():
    base = build_model()
    base.enable_input_require_grads()
    base = build_adapter(base).unload()
    base.enable_input_require_grads()
    assert (
        base(torch.tensor([[1]]), output_hidden_states=True)
        .hidden_states[0]
        .requires_grad
    )


@pytest.fixture
def told(monkeypatch):
    told = []
    warning = lambda text, *values: told.append(text % values)  # noqa: E731
    monkeypatch.setattr(checkpointing.LOG, "warning", warning)
    return told


def sharing(shared):
    return AutoConfig.for_model("gemma3n_text", num_kv_shared_layers=shared)


@pytest.mark.parametrize("settings", [None, {}, {"use_reentrant": True}])
def test_reentrant_checkpointing_is_turned_off_where_layers_share_keys(settings, told):
    """It is axolotl's default; see tuner/test_checkpointing.py for what it loses."""
    cfg = DictDefault(
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": settings}
    )
    keep_shared_keys_and_values(cfg, sharing(10))
    assert cfg.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert "use_reentrant: false is used: the layers of gemma3n_text" in told[0]
    keep_shared_keys_and_values(cfg, sharing(10))
    assert len(told) == 1


def test_reentrant_checkpointing_stays_elsewhere(told):
    settings = {"use_reentrant": True}
    cfg = DictDefault(
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": settings}
    )
    keep_shared_keys_and_values(cfg, sharing(0))
    assert cfg.gradient_checkpointing_kwargs == settings and not told


@pytest.mark.parametrize("offloading", ["legacy", "offload_disk"])
def test_offloading_that_is_reentrant_is_refused_where_layers_share_keys(offloading):
    settings = {"gradient_checkpointing": True, "activation_offloading": offloading}
    with pytest.raises(ValueError, match=f"activation_offloading: {offloading}: the l"):
        keep_shared_keys_and_values(DictDefault(settings), sharing(10))
    keep_shared_keys_and_values(DictDefault(settings), sharing(0))
