"""Several adapters on one base: switched, mixed in a batch by rows, stacked."""

import peft
import pytest
import torch
from conftest import HIDDEN, LAYERS, build_adapter, build_model
from packaging.version import Version
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForSequenceClassification

from axolotl_reft import LoreftConfig
from axolotl_reft.prompts.cached import Adapters

# As different as settings go: layers, positions, tying, rank, component, dropout.
ADAPTERS = {
    "default": {"layers": [0, 1], "positions": "f2+l3", "tied_weights": False},
    "everywhere": {"layers": [1, 2], "positions": "all", "intervention": "direft"},
    "within": {"positions": "l2", "component": "mlp_output", "rank": {"all": 2}},
    "within_everywhere": {"positions": "all", "component": "attention_input"},
    "dropping": {"layers": [-1], "positions": "f3", "rank": 1, "dropout": 0.5},
}
ROWS = ["within", "default", "__base__", "everywhere", "default", "dropping",
        "within_everywhere"]  # fmt: skip
LENGTHS = [9, 4, 11, 7, 12, 5, 6]


def add(model, name, seed, **settings):
    torch.manual_seed(seed)
    model.add_adapter(name, LoreftConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f".{name}." in path:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def build(architecture="llama", **settings):
    first, *others = ADAPTERS
    model = build_adapter(build_model(architecture, **settings), **ADAPTERS[first])
    for seed, name in enumerate(others):
        add(model, name, seed, **ADAPTERS[name])
    return model.eval()


def padded(tokens, side):
    width = max(LENGTHS)
    ids = torch.zeros(len(ROWS), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place], mask[row, place] = tokens(1, length, seed=row)[0], 1
    return {"input_ids": ids, "attention_mask": mask}


def with_adapter(model, name, call):
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    return call()


def expected_rows(model, call, rows=ROWS):
    """Row by row, what the adapter of the row makes of the whole batch."""
    everything = {name: with_adapter(model, name, call) for name in set(rows)}
    return torch.stack([everything[name][row] for row, name in enumerate(rows)])


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_batch_has_its_own_adapter(tokens, architecture, side):
    model = build(architecture)
    batch = padded(tokens, side)
    # As generate computes them.
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    got = model(**batch, adapter_names=ROWS).logits
    expected = expected_rows(model, lambda: model(**batch).logits)
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
    base = ROWS.index("__base__")
    assert torch.equal(got[base], expected[base])
    for row, name in enumerate(ROWS):
        place = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][place][None]
        alone = with_adapter(model, name, lambda ids=ids: model(ids).logits[0])
        assert (got[row][place] - alone).abs().max() < 2e-5
        others = [other for other in set(ROWS) if other != name]
        for other in others:  # or the test could not tell them apart
            wrong = with_adapter(model, other, lambda ids=ids: model(ids).logits[0])
            assert (got[row][place] - wrong).abs().max() > 1e-3


@torch.no_grad()
def test_rows_of_the_base_alone_are_the_base(tokens):
    model = build()
    ids = tokens(2, 9)
    expected = build_model()(ids).logits
    assert torch.equal(model(ids, adapter_names=["__base__"] * 2).logits, expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prefill_chunk_size": 3},
    ],
)
def test_generation_of_a_left_padded_batch(tokens, settings, use_cache):
    if "prefill_chunk_size" in settings and not use_cache:
        pytest.skip("chunks need a cache")
    model = build()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options |= settings | {"use_cache": use_cache}
    got = model.generate(**padded(tokens, "left"), **options, adapter_names=ROWS)
    copies = settings.get("num_return_sequences", 1)
    for row, name in enumerate(ROWS):
        ids = tokens(1, LENGTHS[row], seed=row)
        alone = with_adapter(
            model, name, lambda ids=ids: model.generate(ids, **options)
        )
        new = got[row * copies : (row + 1) * copies, max(LENGTHS) :]
        assert torch.equal(new, alone[:, LENGTHS[row] :])


def test_beams_that_the_generation_config_asks_for(tokens):
    model = build()
    batch = padded(tokens, "left")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**batch, **options, num_beams=3, adapter_names=ROWS)
    model.generation_config.num_beams = 3
    got = model.generate(**batch, **options, adapter_names=ROWS)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_decoding_step_by_step_on_a_cache(tokens):
    model = build()
    ids = tokens(3, 8)
    names = ["default", "everywhere", "__base__"]
    step = model(ids[:, :6], use_cache=True, adapter_names=names)
    cache, got = step.past_key_values, [step.logits]
    for column in (6, 7):
        step = model(ids[:, column, None], past_key_values=cache, adapter_names=names)
        got.append(step.logits)
    labels = ids.clone()
    labels[:, :6] = -100
    expected = expected_rows(model, lambda: model(ids, labels=labels).logits, names)
    assert (torch.cat(got, 1) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_all_samples_of_a_packed_row_have_its_adapter(tokens):
    model = build()
    ids = tokens(3, 13)
    positions = torch.cat([torch.arange(6), torch.arange(7)]).expand(3, 13)
    labels = ids.clone()
    labels[:, :4] = labels[:, 6:10] = -100
    packed = {"labels": labels, "position_ids": positions, "use_cache": False}
    names = ["within", "__base__", "default"]
    got = model(ids, **packed, adapter_names=names).logits
    expected = expected_rows(model, lambda: model(ids, **packed).logits, names)
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


@torch.no_grad()
def test_reserved_slots_compute_what_counted_ones_do(tokens, monkeypatch):
    model = build()
    batch = padded(tokens, "left")
    expected = model(**batch, adapter_names=ROWS).logits
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    got = model(**batch, adapter_names=ROWS).logits
    # More rows of a product are summed up in another order.
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_an_adapter_computes_once_for_all_its_rows(tokens):
    model = build_adapter(build_model(), layers=[0])
    calls = []
    intervention = model.base_model.model.model.layers[0].intv_0["default"]
    intervention.register_forward_hook(lambda m, args, out: calls.append(args[0].shape))
    with torch.no_grad():
        model(tokens(4, 8), adapter_names=["default", "__base__", "default", "default"])
    assert calls == [(3 * 5, HIDDEN)]


@torch.no_grad()
def test_hidden_states_of_mixed_rows_are_the_edited_ones(tokens):
    model = build()
    ids = tokens(2, 8)
    names = ["everywhere", "__base__"]
    options = {"output_hidden_states": True}
    got = model(ids, **options, adapter_names=names).hidden_states
    for number in range(LAYERS + 1):
        expected = expected_rows(
            model, lambda n=number: model(ids, **options).hidden_states[n], names
        )
        assert (got[number] - expected).abs().max() < 1e-5


@torch.no_grad()
def test_the_names_are_for_one_call(tokens):
    model = build()
    ids = tokens(2, 9)
    expected = model(ids).logits
    model(ids, adapter_names=["__base__", "within"])
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(IndexError):
        model(ids + 1000, adapter_names=["__base__", "within"])
    assert torch.equal(model(ids).logits, expected)
    with model.disable_adapter():
        got = model(ids, adapter_names=["within", "within"]).logits
    assert torch.equal(got, build_model()(ids).logits)


def test_names_that_cannot_be_are_refused(tokens):
    model = build()
    ids = tokens(2, 8)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody; there"):
        model(ids, adapter_names=["nobody", "__base__"])
    for names in ([], ["default"], ["default"] * 4):
        message = f"same as the number of inputs, but got {len(names)} and 2"
        with pytest.raises(ValueError, match=message):
            model(ids, adapter_names=names)
        with pytest.raises(ValueError, match=message):
            model.generate(ids, max_new_tokens=1, num_beams=2, adapter_names=names)
    with pytest.raises(TypeError, match="expected a list of str"):
        model(ids, adapter_names="default")
    with pytest.raises(ValueError, match="`adapter_names` when .* training mode"):
        model.train()(ids, adapter_names=["default", "default"])


def build_classifier(heads):
    config = build_model().config
    config.num_labels = 2
    base = AutoModelForSequenceClassification.from_config(config).eval()
    settings = {"task_type": "SEQ_CLS", "positions": "f3"}
    torch.manual_seed(1)
    model = get_peft_model(base, LoreftConfig(**settings))
    for seed in range(heads):
        torch.manual_seed(seed)
        model.add_adapter(f"head{seed}", LoreftConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@torch.no_grad()
def test_rows_have_the_heads_of_their_adapters(tokens):
    model = build_classifier(heads=2)
    ids = tokens(4, 8)
    names = ["head1", "default", "__base__", "head0"]
    got = model(ids, adapter_names=names).logits
    expected = expected_rows(model, lambda: model(ids).logits, names)
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("asked", ["in the call", "by the config"])
def test_beams_have_the_heads_of_their_adapters(tokens, asked):
    model = build_adapter(build_model(), modules_to_save=["lm_head"])
    add(model, "other", 0, positions="l1", modules_to_save=["lm_head"])
    ids, names = tokens(3, 8), ["other", "default", "__base__"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(ids)}
    beams = {"num_beams": 3, "num_return_sequences": 2}
    if asked == "by the config":
        model.generation_config.update(**beams)
    else:
        options |= beams
    got = model.eval().generate(ids, **options, adapter_names=names)
    for row, name in enumerate(names):
        alone = with_adapter(model, name, lambda: model.generate(ids, **options))
        assert torch.equal(got[2 * row : 2 * row + 2], alone[2 * row : 2 * row + 2])


def test_heads_that_some_adapters_have_cannot_be_mixed(tokens):
    model = build_adapter(build_model(), modules_to_save=["lm_head"])
    add(model, "headless", 0, layers=[0])
    ids = tokens(2, 8)
    message = "'headless' has no lm_head of its own.*cannot mix them in one batch"
    with pytest.raises(ValueError, match=message):
        model.eval()(ids, adapter_names=["headless", "default"])
    model.set_adapter("headless")
    with pytest.raises(ValueError, match=message):
        model.eval()(ids, adapter_names=["default", "__base__"])


@torch.no_grad()
@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_several_active_adapters_edit_in_the_order_they_are_named(tokens, component):
    model = build_adapter(build_model(), layers=[1], component=component)
    add(model, "second", 3, layers=[1], positions="all", component=component)
    ids = tokens(1, 9)
    layer = model.base_model.model.model.layers[1]
    place = layer if component == "block_output" else layer.base_layer.mlp
    unedited = layer.base_layer if place is layer else place
    seen = {}

    def note(key):
        return lambda module, args, out: seen.update({key: out.clone()})

    unedited.register_forward_hook(note("before"), prepend=True)
    place.register_forward_hook(note("after"))
    for order in (["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(order)
        assert model.base_model.active_adapters == order
        model(ids)
        hidden = seen["before"][0]
        for name in order:
            places = torch.arange(9) if name == "second" else [0, 1, 6, 7, 8]
            hidden[places] = layer.intv_0[name](hidden[places])
        assert (seen["after"][0] - hidden).abs().max() < 1e-5


@torch.no_grad()
def test_a_switch_is_never_stale(tmp_path, tokens):
    """Nothing computed for one adapter is used for another of its name or place."""
    model = build()
    ids = tokens(2, 9)
    names = list(ADAPTERS)
    alone = {
        name: with_adapter(model, name, lambda: model(ids).logits) for name in names
    }
    for one in names:
        for other in names:
            for name in (one, other, one):
                got = with_adapter(model, name, lambda: model(ids).logits)
                assert torch.equal(got, alone[name])
    model.save_pretrained(tmp_path)
    fresh = build_adapter(build_model(), seed=9, **ADAPTERS["default"])
    before = fresh(ids).logits
    fresh.load_adapter(tmp_path, "default")
    assert torch.equal(fresh(ids).logits, alone["default"])
    assert not torch.equal(before, alone["default"])
    for name in names[1:]:
        fresh.load_adapter(tmp_path / name, name)
        assert torch.equal(fresh(ids).logits, alone["default"])
    for name in names:
        fresh.set_adapter(name)
        assert torch.equal(fresh(ids).logits, alone[name])


def test_what_a_deleted_adapter_asked_for_is_forgotten():
    model = build_adapter(build_model(), positions="all")
    layer = model.base_model.model.model.layers[0]
    state = layer.state

    def turns():
        every = Adapters(tuple(state.adapters), (1.0,) * len(state.adapters))
        return {turns.every for turns in state.turns(every)}

    assert layer._edits_every_token and not turns()
    settings = {"task_type": "CAUSAL_LM", "positions": "f1", "rank": 2}
    model.add_adapter("first", LoreftConfig(**settings, turns="first"))
    model.add_adapter("every", LoreftConfig(**settings, turns="every"))
    assert turns() == {True, False}
    model.delete_adapter("every")
    assert turns() == {False}
    # Another of the name of one that is there takes its place.
    model.base_model.inject_adapter(model.base_model.model, "default")
    model.delete_adapter("default")
    assert not layer._edits_every_token
    model.delete_adapter("first")
    assert not turns()


@torch.no_grad()
def test_every_adapter_is_saved_by_itself(tmp_path, tokens):
    model = build()
    ids = tokens(2, 9)
    alone = {n: with_adapter(model, n, lambda: model(ids).logits) for n in ADAPTERS}
    model.save_pretrained(tmp_path)
    for name, expected in alone.items():
        folder = tmp_path if name == "default" else tmp_path / name
        loaded = PeftModel.from_pretrained(build_model(), folder)
        assert torch.equal(loaded(ids).logits, expected)


def peft_refuses_names_in_use(model):
    """From 0.21 on, and leaves the adapter as it is."""
    if Version(peft.__version__) < Version("0.21"):
        return False
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="'other' already exists"):
        add(model, "other", 6, layers=[2], positions="l1")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    return True


@torch.no_grad()
def test_an_adapter_of_the_same_name_is_replaced(tokens):
    model = build_adapter(build_model(), layers=[0, 1], tied_weights=False)
    add(model, "other", 5, layers=[0], positions="f2+l2", tied_weights=False)
    if peft_refuses_names_in_use(model):
        model.delete_adapter("other")
    add(model, "other", 6, layers=[2], positions="l1")
    model.set_adapter("other")
    ids = tokens(2, 9)
    alone = build_adapter(build_model(), layers=[0])
    add(alone, "other", 6, layers=[2], positions="l1")
    alone.set_adapter("other")
    assert torch.equal(model.eval()(ids).logits, alone.eval()(ids).logits)


@torch.no_grad()
def test_deleting_and_unloading(tokens):
    model = build()
    ids = tokens(2, 9)
    expected = with_adapter(model, "within", lambda: model(ids).logits)
    model.set_adapter("default")
    for name in ("default", "everywhere", "dropping", "within_everywhere"):
        model.delete_adapter(name)
    assert model.active_adapters == ["within"]
    assert torch.equal(model(ids).logits, expected)
    assert list(model.peft_config) == ["within"]
    with pytest.raises(
        ValueError, match="non-existing adapter.*: default; there are w"
    ):
        model(ids, adapter_names=["default", "within"])
    base = model.unload()
    assert torch.equal(base(ids).logits, build_model()(ids).logits)
    assert not base.model.layers[0].mlp._forward_hooks


def test_what_peft_says_of_the_model():
    model = build()
    status = model.get_model_status()
    assert status.adapter_model_type == "LoreftModel"
    assert status.peft_types == dict.fromkeys(ADAPTERS, "LOREFT")
    assert status.available_adapters == sorted(ADAPTERS)
    assert status.active_adapters == ["default"] and status.enabled
    assert status.num_adapter_layers == LAYERS and status.merged_adapters == []
    assert status.requires_grad == {name: name == "default" for name in ADAPTERS}
    alone = get_peft_model(build_model(), LoreftConfig(**ADAPTERS["default"]))
    trainable = alone.get_model_status().trainable_params
    assert status.trainable_params == trainable > 0
    layers = model.get_layer_status()
    assert [layer.name for layer in layers] == [
        f"model.model.layers.{number}" for number in range(LAYERS)
    ]
    assert layers[0].available_adapters == ["default", "within", "within_everywhere"]
    model.set_adapter("within")
    assert model.get_model_status().active_adapters == ["within"]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    model.base_model.set_adapter(["default", "within"])
    assert model.get_model_status().active_adapters == ["default", "within"]


def test_adding_up_and_swapping_in_place_are_refused(tmp_path):
    model = build()
    with pytest.raises(ValueError, match="add_weighted_adapter: .*cannot be added up"):
        model.add_weighted_adapter(["default", "within"], [0.5, 0.5], "sum")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but LOREFT"):
        hotswap_adapter(model, str(tmp_path), "default")


@pytest.mark.parametrize(
    "name",
    ["__base__", "layers", "0", "rotation", "weight", "intv_0", "a.b", "keys", ""],
)
def test_names_that_peft_would_mistake_are_refused(name):
    message = "adapter_name: .* cannot be an adapter's name: PEFT or torch would take"
    with pytest.raises(ValueError, match=message):
        get_peft_model(build_model(), LoreftConfig(), adapter_name=name)
    model = build_adapter(build_model())
    with pytest.raises(ValueError, match=message):
        model.add_adapter(name, LoreftConfig(task_type="CAUSAL_LM"))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["ref", "default_2", "reference", "v", "intervention"])
def test_names_that_contain_others_are_no_matter(tmp_path, tokens, name):
    model = build_adapter(build_model())
    add(model, name, 4, layers=[1], positions="all")
    model.set_adapter(name)
    ids = tokens(1, 8)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        model.save_pretrained(tmp_path, selected_adapters=[name])
        loaded = build_adapter(build_model(), seed=8)
        loaded.load_adapter(tmp_path / name, name)
        loaded.set_adapter(name)
        assert torch.equal(loaded.eval()(ids).logits, expected)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_and_adding_freezes_what_pefts_lora_does(is_trainable, tmp_path):
    def trained(config):
        get_peft_model(build_model(), config).save_pretrained(tmp_path)
        model = build_model()
        model = PeftModel.from_pretrained(model, tmp_path, is_trainable=is_trainable)
        yield model
        model.load_adapter(tmp_path, "same", is_trainable=is_trainable)
        yield model
        model.load_adapter(tmp_path, "opposite", is_trainable=not is_trainable)
        yield model
        model.add_adapter("added", config)
        yield model

    def status(config):
        return [
            {
                (name, parameter.requires_grad)
                for path, parameter in model.named_parameters()
                for name in model.peft_config
                if f".{name}" in path
            }
            for model in trained(config)
        ]

    head = {"modules_to_save": ["lm_head"]}
    loreft = status(LoreftConfig(tied_weights=False, **head))
    assert loreft == status(peft.LoraConfig(target_modules=["q_proj"], **head))
    assert loreft[0] == {("default", is_trainable)}
