"""An adapter at a strength: h + α(Φ(h) − h) in the place of Φ(h)."""

import copy
from functools import partial

import pytest
import torch
from conftest import build_adapter, build_model, move_parameters
from frozen_prompts import TOLERANCE, difference, ragged, results, two_parts
from peft import LoraConfig, PeftModel
from plain_reference import edited_by_hand, edited_tokens

from axolotl_reft import LoreftConfig

# As different as settings go.
ADAPTERS = {
    "untied": {"tied_weights": False},
    "everywhere": {"positions": "all"},
    "inside": {"component": "mlp_output", "intervention": "direft"},
    "input": {"component": "attention_input", "positions": "l2"},
    "activation": {"act_fn": "relu", "rank": 2},
    "dropout": {"dropout": 0.5},
    "lora": {"layers": [1], "lora": {"r": 2, "target_modules": ["q_proj"]}},
}
STRENGTHS = [-1, 0.3, 0.75, 1.5]


def build(name="untied", **overrides):
    settings = {"positions": "f2+l3"} | ADAPTERS[name] | overrides
    return build_adapter(build_model(), **settings)


def forward(model, ids, **settings):
    with torch.no_grad():
        return model(ids, **settings).logits


def at(model, strength, call, name="default"):
    model.set_scale(name, strength)
    return call()


# --- what it computes --------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_0_is_the_base_and_1_the_adapter_to_the_bit(tokens, name, dtype):
    model, ids = build(name).to(dtype), tokens(2, 9)
    adapter = forward(model, ids)
    base = forward(build_model().to(dtype), ids)
    assert not torch.equal(adapter, base)
    assert torch.equal(at(model, 0, partial(forward, model, ids)), base)
    assert torch.equal(model(ids).logits, base)  # with gradients
    assert torch.equal(at(model, 1, partial(forward, model, ids)), adapter)
    between = at(model, 0.5, partial(forward, model, ids))
    assert not torch.equal(between, adapter) and not torch.equal(between, base)


def test_0_is_the_base_whatever_the_adapter_holds(tokens):
    model, ids = build(), tokens(2, 9)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(torch.nan)
    got = at(model, 0, partial(forward, model, ids))
    assert torch.equal(got, forward(build_model(), ids))


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_is_the_equation(tokens, strength, architecture):
    base, ids = build_model(architecture), tokens(2, 9)
    model = build_adapter(copy.deepcopy(base), tied_weights=False)
    model.set_scale("default", strength)
    with edited_by_hand(base, model, edited_tokens(9), strength=strength) as by_hand:
        expected = by_hand(ids).logits
    assert (forward(model, ids) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["untied", "everywhere", "inside", "input"])
def test_direft_is_linear_in_it(tokens, name):
    """α(Wh + b) in the place of Wh + b, in training and in generation."""
    # The last layer's prefix changes no loss.
    model = build(name, intervention="direft", layers=[0, 1]).train()
    twin = copy.deepcopy(model)
    for path, parameter in twin.named_parameters():
        if path.endswith((".weight", ".bias")) and parameter.requires_grad:
            parameter.data *= 0.4
    model.set_scale("default", 0.4)
    batch = {"input_ids": tokens(2, 9)}
    batch["labels"] = batch["input_ids"].where(torch.arange(9) > 5, -100)
    got, expected = model(**batch), twin(**batch)
    assert (got.logits - expected.logits).abs().max() < 2e-5
    got.loss.backward()
    expected.loss.backward()
    others = dict(twin.named_parameters())
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = 1.0 if path.endswith(".proj_weight") else 0.4
            gradient = factor * others[path].grad
            assert gradient.any()
            assert (parameter.grad - gradient).abs().max() < 1e-5
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = [
        each.eval().generate(batch["input_ids"], **options) for each in (model, twin)
    ]
    assert torch.equal(*generated)


def test_dropped_entries_are_between_too(tokens):
    """Dropout is of the whole Φ(h): an entry is 0 or Φ(h)/(1 − p) before the rest."""
    model = build("dropout", positions="all", layers=[0]).train()
    layer, seen = model.base_model.model.model.layers[0], {}
    layer.base_layer.register_forward_hook(lambda m, i, out: seen.update(h=out))
    layer.register_forward_hook(lambda m, i, out: seen.update(edited=out))
    model.set_scale("default", 0.4)
    model(tokens(2, 9))
    h, edited = seen["h"], seen["edited"]
    whole = layer.intv_0["default"].eval()(h)
    dropped, kept = h + 0.4 * (0 - h), h + 0.4 * (2 * whole - h)
    is_dropped, is_kept = ((edited - way).abs() < 1e-5 for way in (dropped, kept))
    assert (is_dropped | is_kept).all()
    assert 0.4 < is_dropped.float().mean() < 0.6


def test_each_of_several_active_adapters_has_its_own(tokens):
    model, ids = build(layers=[1]), tokens(1, 9)
    torch.manual_seed(3)
    settings = {"task_type": "CAUSAL_LM", "positions": "all", "layers": [1]}
    model.add_adapter("second", LoreftConfig(**settings))
    move_parameters(model, 0.2)
    layer, seen = model.base_model.model.model.layers[1], {}
    layer.base_layer.register_forward_hook(lambda m, i, out: seen.update(before=out))
    layer.register_forward_hook(lambda m, i, out: seen.update(after=out))
    model.base_model.set_adapter(["default", "second"])
    model.set_scale("default", 0.3)
    model.set_scale("second", 0.6)
    forward(model, ids)
    h = seen["before"].clone()
    for side, rows in enumerate(edited_tokens(9)):
        phi = layer.interventions("default")[side](h[0, rows])
        h[0, rows] += 0.3 * (phi - h[0, rows])
    h += 0.6 * (layer.intv_0["second"](h) - h)
    assert (seen["after"] - h).abs().max() < 1e-5


def test_hidden_states_are_those_that_the_next_layer_gets(tokens):
    model, ids = build(layers=[0]), tokens(1, 9)
    layers, seen = model.base_model.model.model.layers, {}
    layers[1].register_forward_pre_hook(lambda m, args: seen.update(h=args[0]))
    model.set_scale("default", 0.5)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], seen["h"])


def test_lora_beside_is_scaled_as_pefts(tokens):
    lora = {"r": 3, "target_modules": ["q_proj", "down_proj"]}
    model, ids = (
        build_adapter(build_model(), intervention="direft", lora=lora),
        tokens(2, 9),
    )
    theirs = build_model()
    theirs.add_adapter(LoraConfig(lora_alpha=3, **lora), "default")
    for number, layer in enumerate(model.base_model.model.model.layers):
        layer.intv_0["default"].proj_weight.data.zero_()  # of LoReFT nothing is left
        ours = layer.intv_lora["default"]
        for path in ours.paths:
            module = theirs.model.layers[number].get_submodule(path)
            stem = path.replace(".", "_")
            for side in "AB":
                weight = getattr(module, f"lora_{side}")["default"].weight
                weight.data.copy_(ours.get_parameter(f"{stem}_{side}"))
            module.set_scale("default", 0.4)
    expected = forward(theirs, ids)
    got = at(model, 0.4, partial(forward, model, ids))
    assert (got - expected).abs().max() < 1e-5
    whole = at(model, 1, partial(forward, model, ids))
    assert (whole - expected).abs().max() > 1e-2


# --- rows of a batch ---------------------------------------------------------------

ROWS = [("default", 0.5), "default", "__base__", ("other", 2.0), ("default", 0),
        "other", ("default", 1.0), ("__base__", 0.5)]  # fmt: skip


def build_two(name="untied", other="everywhere", **settings):
    model = build(name, **settings)
    add_other(model, other, **settings)
    return model


def add_other(model, name, **settings):
    torch.manual_seed(5)
    config = {"task_type": "CAUSAL_LM", **ADAPTERS[name], **settings}
    model.add_adapter("other", LoreftConfig(**config))
    for path, parameter in model.named_parameters():
        if ".other." in path:
            parameter.data += torch.randn_like(parameter) * 0.2
    model.eval()


def by_set_scale(model, row, call):
    """What a row gives where all rows have its adapter and strength."""
    name, strength = row if isinstance(row, tuple) else (row, 1)
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    try:
        return at(model, strength, call, name)
    finally:
        model.set_scale(name, 1)


@pytest.mark.parametrize("other", ADAPTERS)
def test_each_row_of_a_batch_has_its_own(tokens, other):
    model, ids = build_two(other=other), tokens(len(ROWS), 9)
    got = forward(model, ids, adapter_names=ROWS)
    for number, row in enumerate(ROWS):
        expected = by_set_scale(model, row, partial(forward, model, ids))[number]
        assert (got[number] - expected).abs().max() < 1e-5
    assert torch.equal(got[2], forward(build_model(), ids)[2])


def test_rows_at_full_strength_are_as_without_any(tokens):
    model, ids = build_two(), tokens(4, 9)
    names = ["default", "other", "__base__", "default"]
    expected = forward(model, ids, adapter_names=names)
    mixed = [names[0], names[1], names[2], ("default", 0.5)]
    assert torch.equal(forward(model, ids, adapter_names=mixed)[:3], expected[:3])
    half = forward(model, ids, adapter_names=[("default", 0.5)] * 4)
    assert torch.equal(half, at(model, 0.5, partial(forward, model, ids)))
    model.set_scale("default", 1)
    full = [(name, 1.0) for name in names]
    assert torch.equal(forward(model, ids, adapter_names=full), expected)


def test_a_row_without_a_strength_has_that_of_its_adapter(tokens):
    model, ids = build_two(), tokens(2, 9)
    model.set_scale("default", 0.25)
    got = forward(model, ids, adapter_names=["default", ("default", 0.5)])
    expected = forward(model, ids, adapter_names=[("default", 0.25), ("default", 0.5)])
    assert torch.equal(got, expected)
    assert torch.equal(got[0], forward(model, ids)[0])


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generation_with_a_strength_by_row(tokens, settings):
    model, ids = build_two(), tokens(len(ROWS), 9)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | settings
    options["attention_mask"] = torch.ones_like(ids)
    got = model.generate(ids, **options, adapter_names=ROWS)
    for number, row in enumerate(ROWS):
        call = partial(model.generate, ids, **options)
        assert torch.equal(got[number], by_set_scale(model, row, call)[number])


def test_rows_have_the_trained_modules_of_their_adapters(tokens):
    model = build_two(modules_to_save=["lm_head"])
    ids, rows = tokens(3, 9), [("default", 0.5), ("other", 0), "default"]
    got = forward(model, ids, adapter_names=rows)
    for number, row in enumerate(rows):
        expected = by_set_scale(model, row, partial(forward, model, ids))[number]
        assert (got[number] - expected).abs().max() < 1e-5


def test_a_strength_by_row_is_as_exact_in_bfloat16(tokens):
    """0.3 is 0.30078 in bfloat16."""
    model, ids = build().to(torch.bfloat16), tokens(2, 9)
    got = forward(model, ids, adapter_names=[("default", 0.3), ("default", 0.6)])
    for number, strength in enumerate((0.3, 0.6)):
        alone = at(model, strength, partial(forward, model, ids))
        assert torch.equal(got[number], alone[number])


# --- caches ------------------------------------------------------------------------


def answer(model, ids, **settings):
    output = model.generate(
        ids, max_new_tokens=4, do_sample=False, pad_token_id=0, output_logits=True,
        attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **settings
    )  # fmt: skip
    return torch.stack(output.logits, 1), output.past_key_values


@pytest.mark.parametrize("positions", ["f2+l3", "l2", "all"])
@pytest.mark.parametrize(
    ("filled_at", "strength"), [(1, 0.5), (0.5, 1), (0.5, 0), (0, 0.5)]
)
def test_a_cache_that_another_strength_filled(tokens, positions, filled_at, strength):
    model, ids = build(positions=positions), tokens(1, 14)
    _, cache = at(model, filled_at, partial(answer, model, ids[:, :9]))
    model.set_scale("default", strength)
    expected, _ = answer(model, ids)
    got, _ = answer(model, ids, past_key_values=cache)
    assert (got - expected).abs().max() < 1e-5


def test_what_no_strength_has_changed_is_kept(tokens):
    model, ids, lengths = build(positions="l2"), tokens(1, 14), []
    model.base_model.model.model.register_forward_pre_hook(
        lambda m, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    _, cache = answer(model, ids)
    lengths.clear()
    for strength in (0.5, 0.5, 0):
        at(model, strength, partial(answer, model, ids, past_key_values=cache))
    assert [length for length in lengths if length > 1] == [2, 2]
    with model.disable_adapter():  # 0 was the base
        lengths.clear()
        answer(model, ids, past_key_values=cache)
    assert set(lengths) == {1}


def test_rows_on_a_cache_have_their_own(tokens):
    model, ids = build(), tokens(2, 12)
    rows, turned = [("default", 0.5), "default"], ["default", ("default", 0.5)]
    _, cache = answer(model, ids, adapter_names=rows)
    for names in (rows, turned, [("default", 0)] * 2):
        expected, _ = answer(model, ids, adapter_names=names)
        got, cache = answer(model, ids, adapter_names=names, past_key_values=cache)
        assert (got - expected).abs().max() < 1e-5


def test_a_forward_on_a_cache_of_another_strength_is_refused(tokens):
    model, ids = build(), tokens(1, 10)
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
    model.set_scale("default", 0.5)
    message = "edited for another prompt, adapter or strength; pass a fresh cache"
    with pytest.raises(ValueError, match=message):
        forward(model, ids[:, 9:], past_key_values=cache)
    model.set_scale("default", 1)
    labels = ids.where(torch.arange(10) >= 9, -100)
    expected = forward(model, ids, labels=labels)[:, -1:]
    got = forward(model, ids[:, 9:], past_key_values=cache)
    assert (got - expected).abs().max() < 1e-5


def test_a_cache_of_trained_embeddings_is_not_the_bases(tokens):
    """They have no strength, and 0 leaves them."""
    model, ids = build(modules_to_save=["embed_tokens"]), tokens(1, 12)
    with model.disable_adapter():
        _, cache = answer(model, ids)
    model.set_scale("default", 0)
    expected, _ = answer(model, ids)
    got, _ = answer(model, ids, past_key_values=cache)
    assert (got - expected).abs().max() < 1e-5


# --- training, compiled and shared models ------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"layers": [2], "positions": "f2+l3"}])
def test_training_with_kept_states_has_it(settings, monkeypatch):
    """Behind the frozen tokens of prompts, and behind frozen layers."""
    always = "axolotl_reft.tuner.frozen_prompt"
    for rule in ("saves_time", "lower_saves_time"):
        monkeypatch.setattr(f"{always}.{rule}", lambda *args: True)
    model = build_adapter(build_model(), **{"positions": "l3"} | settings).train()
    batch = ragged([20, 17, 9, 13], [14, 10, 4, 12])
    whole = results(model, batch)
    model.set_scale("default", 0.5)
    expected = results(model, batch)
    assert difference(expected, whole) > 100 * TOLERANCE
    with two_parts(model, "auto") as seen:
        for _ in range(2):
            assert difference(results(model, batch), expected) < TOLERANCE
        assert "computed with the rest" not in seen.told[0]


@pytest.mark.parametrize("name", ["untied", "input"])
def test_what_is_computed_again_has_that_of_its_forward(tokens, name):
    """Edits within a checkpointed layer are replayed in backward."""
    model, gradients = build(name, layers=[0, 1]).train(), []
    ids = tokens(2, 9)
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.set_scale("default", 0.5)
        loss = model(ids, labels=ids.where(ids > 30, -100), use_cache=False).loss
        model.set_scale("default", 1)
        model.zero_grad()
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients.append([p.grad.clone() for p in trained])
    for plain, replayed in zip(*gradients, strict=True):
        assert plain.any() and torch.equal(plain, replayed)


def test_0_gives_zero_gradients(tokens):
    model, ids = build().train(), tokens(2, 9)
    at(model, 0, lambda: model(ids, labels=ids.where(ids > 30, -100)).loss.backward())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and not any(p.grad.any() for p in trained)


def test_a_compiled_model_follows_it(tokens):
    torch._dynamo.reset()
    model, ids = build(layers=[0]), tokens(2, 9)
    steps = [1, 0.5, 0, 0.25]
    expected = [at(model, s, partial(forward, model, ids)) for s in steps]
    model.compile(backend="eager", fullgraph=True)
    for strength, logits in zip(steps, expected, strict=True):
        got = at(model, strength, partial(forward, model, ids))
        assert (got - logits).abs().max() < 1e-5
    torch._dynamo.reset()


# --- of the live model -------------------------------------------------------------


def test_it_is_not_saved(tmp_path, tokens):
    model, ids = build(), tokens(2, 9)
    expected = forward(model, ids)
    model.set_scale("default", 0.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model(), tmp_path)
    assert torch.equal(forward(loaded, ids), expected)


def test_switching_and_disabling_leave_it(tokens):
    model, ids = build_two(), tokens(2, 9)
    expected = at(model, 0.5, partial(forward, model, ids))
    other = by_set_scale(model, "other", partial(forward, model, ids))
    with model.disable_adapter():
        assert torch.equal(forward(model, ids), forward(build_model(), ids))
    model.set_adapter("default")
    assert torch.equal(forward(model, ids), expected)
    fresh = build_two()
    fresh.set_adapter("other")
    assert torch.equal(forward(fresh, ids), other)


def test_another_adapter_of_its_name_starts_at_1(tokens):
    model, ids = build_two(), tokens(2, 9)
    expected = by_set_scale(model, "other", partial(forward, model, ids))
    model.set_scale("other", 0.5)
    model.set_adapter("default")
    model.delete_adapter("other")
    add_other(model, "everywhere")
    model.set_adapter("other")
    assert torch.equal(forward(model, ids), expected)


def test_what_cannot_be_a_strength_is_refused(tokens):
    model, ids = build(), tokens(1, 9)
    with pytest.raises(ValueError, match="there is no adapter 'missing', only default"):
        model.set_scale("missing", 0.5)
    expected = forward(model, ids)
    for wrong in (float("nan"), float("inf"), -float("inf"), 1e39, "0.5", None):
        message = "strength of 'default': .* is not a finite number; pass 1 for"
        with pytest.raises(ValueError, match=f"set_scale: the {message}"):
            model.set_scale("default", wrong)
        with pytest.raises(ValueError, match=f"adapter_names: the {message}"):
            model(ids, adapter_names=[("default", wrong)])
    for entry in (("nobody", 0.5), ("default",), ("default", 0.5, 1)):
        with pytest.raises(ValueError, match="non-existing adapter"):
            model(ids, adapter_names=[entry])
    assert torch.equal(forward(model, ids), expected)
