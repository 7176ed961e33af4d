import copy

import pytest
import torch
from conftest import LAYERS, build_adapter, build_model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_is_exact_with_a_forward_in_between(
    tokens, use_reentrant
):
    ids = tokens(2, 10)
    labels = ids.clone()
    labels[:, :6] = -100
    model = build_adapter(build_model(), dropout=0.0).train()
    expected = gradients(model, model(ids, labels=labels).loss)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    loss = model(ids, labels=labels).loss
    with torch.no_grad():  # as KTO does: other prompts, other positions
        model(tokens(3, 7, seed=1), labels=tokens(3, 7, seed=1))
    got = gradients(model, loss)
    assert len(got) == len(expected) == 3 * LAYERS
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_hidden_states_that_are_asked_for_are_the_edited_ones(tokens, architecture):
    model = build_adapter(build_model(architecture))
    seen = []
    for module in model.modules():
        if type(module).__name__ == "LoreftDecoderLayer":
            module.register_forward_hook(
                lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
            )
    states = model(tokens(2, 8), output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1
    for got, edited in zip(states[1:-1], seen[:-1], strict=True):
        assert torch.equal(got, edited)


def test_what_the_config_asks_for_is_given(tokens):
    """PEFT hands None down for what the call does not ask for, and transformers takes
    that for a no."""
    model = build_adapter(build_model())
    expected = model(tokens(2, 8), output_hidden_states=True).hidden_states
    model.config.output_hidden_states = True
    got = model(tokens(2, 8)).hidden_states
    assert len(got) == len(expected) == LAYERS + 1
    assert all(torch.equal(h, other) for h, other in zip(got, expected, strict=True))
    assert model(tokens(2, 8), output_hidden_states=False).hidden_states is None


def test_the_wrapper_answers_for_its_layer():
    layer = build_adapter(build_model()).base_model.model.model.layers[0]
    assert layer.self_attn is layer.base_layer.self_attn
    assert "DecoderLayer" in type(layer).__name__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = layer.nothing


@torch.no_grad()
def note_forward(layer, note):
    """As accelerate's hooks do: the instance gets a forward of its own."""
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: note() or forward(*args, **kwargs)


def note_compiled(layer, note):
    """As ``layer.compile()`` does."""
    call = layer._call_impl
    layer._compiled_call_impl = lambda *args, **kwargs: note() or call(*args, **kwargs)


HANGS_ON = {
    "hook": lambda layer, note: layer.register_forward_hook(lambda *_: note()),
    "pre-hook": lambda layer, note: layer.register_forward_pre_hook(lambda *_: note()),
    "forward": note_forward,
    "compiled": note_compiled,
}


@pytest.mark.parametrize("way", list(HANGS_ON))
@torch.no_grad()
def test_what_hangs_on_the_wrapper_is_not_passed_over_in_a_decode_step(tokens, way):
    model = build_adapter(build_model())
    cache = model(tokens(1, 6), use_cache=True).past_key_values
    expected = model(tokens(1, 1), past_key_values=copy.deepcopy(cache)).logits
    noted = []
    layer = model.base_model.model.model.layers[1]
    HANGS_ON[way](layer, lambda: noted.append(way))
    assert torch.equal(model(tokens(1, 1), past_key_values=cache).logits, expected)
    assert noted == [way]


def test_layers_that_are_not_named_are_left_alone(tokens):
    plain = build_model()
    expected = plain(tokens(1, 8), output_hidden_states=True).hidden_states
    model = build_adapter(build_model(), layers=[-1])
    got = model(tokens(1, 8), output_hidden_states=True).hidden_states
    for layer in range(LAYERS):
        assert torch.equal(got[layer], expected[layer])
    assert not torch.equal(got[-1], expected[-1])
