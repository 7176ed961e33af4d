import copy
import pickle

import pytest
import torch
from conftest import HIDDEN, LAYERS, build_adapter, build_model
from peft import AutoPeftModelForCausalLM, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from axolotl_reft import LoreftConfig
from axolotl_reft.settings.spec import INTERVENTIONS


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.fixture
def ids(tokens):
    return tokens(2, 9)


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


def test_the_method_is_a_member_of_pefts_own_enumeration():
    loreft = PeftType("LOREFT")
    assert loreft in list(PeftType) and PeftType.LOREFT is loreft
    assert loreft == "LOREFT" and loreft.name == loreft.value == "LOREFT"
    assert pickle.loads(pickle.dumps(loreft)) is loreft
    assert copy.deepcopy(loreft) is loreft


@pytest.mark.parametrize("rank", [1, 4, HIDDEN])
@pytest.mark.parametrize("layers", ["all", [-1]])
@pytest.mark.parametrize(
    ("positions", "tied", "sides"),
    [("f2+l2", True, 1), ("f2+l2", False, 2), ("l2", False, 1), ("all", False, 1)],
)
def test_the_parameters_are_the_papers(capsys, rank, layers, positions, tied, sides):
    config = LoreftConfig(
        rank=rank, layers=layers, positions=positions, tied_weights=tied
    )
    model = get_peft_model(build_model(), config)
    expected = (LAYERS if layers == "all" else 1) * sides * (2 * rank * HIDDEN + rank)
    assert trainable(model) == expected
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,} ||" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "settings", "expected"),
    [
        ({"hidden_size": 4096, "num_hidden_layers": 32}, {"rank": 8}, 2_097_408),
        (
            {"hidden_size": 4096, "num_hidden_layers": 32},
            {"rank": 4, "layers": [3, 9, 18, 24], "tied_weights": False},
            262_176,
        ),
        ({"hidden_size": 4096, "num_hidden_layers": 1}, {"rank": 4}, 32_772),
    ],
)
def test_parameters_at_the_sizes_of_llama(shape, settings, expected):
    """arXiv 2404.03592, Tables 1 and 3: 0.031% and 0.0039% of 7B."""
    config = AutoConfig.for_model("llama", vocab_size=8, **shape)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    assert trainable(get_peft_model(base, LoreftConfig(**settings))) == expected


@pytest.mark.parametrize("positions", ["l2", "f2+l2", "all"])
def test_an_identity_begins_with_the_bases_logits(tmp_path, ids, positions):
    base = build_model()
    expected = logits(base, ids)
    config = LoreftConfig(
        positions=positions, tied_weights=False, init_weights="identity"
    )
    model = get_peft_model(base, config)
    assert torch.equal(logits(model, ids), expected)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    trained = logits(model, ids)
    assert not torch.allclose(trained, expected, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model(), tmp_path)
    assert torch.equal(logits(loaded, ids), trained)
    lean = PeftModel.from_pretrained(build_model(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(lean, ids), trained)


@pytest.mark.parametrize("intervention", INTERVENTIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_number_reloads_bit_for_bit(tmp_path, ids, intervention, tied):
    model = build_adapter(build_model(), intervention=intervention, tied_weights=tied)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(build_model(), tmp_path)
    state = loaded.state_dict()
    for key, tensor in saved.items():
        start, _, name = key.rpartition(".")
        assert torch.equal(state[f"{start}.default.{name}"], tensor)
    assert sum(".intv_" in key for key in state) == len(saved) > 0
    assert torch.equal(logits(loaded, ids), expected)


def test_reload_on_every_architecture(tmp_path, ids, architecture):
    model = build_adapter(build_model(architecture))
    expected = logits(model, ids)
    assert (expected - logits(build_model(architecture), ids)).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model(architecture), tmp_path)
    assert torch.equal(logits(loaded, ids), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_loading_by_the_adapters_name_alone(tmp_path, ids, low_cpu_mem_usage):
    base = build_model()
    base.save_pretrained(tmp_path / "base")
    named = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = build_adapter(named)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    by_peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **options)
    assert torch.equal(logits(by_peft, ids), expected)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(by_transformers, ids), expected)


def test_generation_of_a_model_loaded_by_transformers_alone(tmp_path, ids):
    """There PEFT's tuner object is thrown away; the hooks must do without it."""
    build_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = build_adapter(base)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for use_cache in (True, False):
        got = loaded.generate(ids, use_cache=use_cache, **settings)
        assert torch.equal(got, model.generate(ids, **settings))


def test_disabled_it_is_the_base_bit_for_bit(ids):
    expected = logits(build_model(), ids)
    model = build_adapter(build_model())
    edited = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model, ids), edited)
    assert not torch.equal(edited, expected)


def test_two_adapters_are_switched_and_deleted(ids):
    model = build_adapter(build_model(), layers=[0, 1], positions="f2")
    first = logits(model, ids)
    settings = {"layers": [1, 2], "positions": "l4", "rank": 2}
    other = LoreftConfig(task_type="CAUSAL_LM", **settings)
    torch.manual_seed(3)
    model.add_adapter("other", other)
    assert torch.equal(logits(model, ids), first)
    model.set_adapter("other")
    second = logits(model, ids)
    torch.manual_seed(3)
    alone = get_peft_model(build_model(), LoreftConfig(**settings))
    assert not torch.equal(second, first)
    assert trainable(model) == trainable(alone)
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model, ids), second)
    assert not any(".default." in name for name, _ in model.named_parameters())
    # The name is free again, for other layers too.
    model.add_adapter("default", LoreftConfig(task_type="CAUSAL_LM", layers=[2]))
    model.set_adapter("default")
    assert trainable(model) == 2 * 8 * HIDDEN + 8
    assert not torch.equal(logits(model, ids), second)


def test_unloading_gives_back_the_base(ids):
    base = build_model()
    expected, names = logits(base, ids), [name for name, _ in base.named_modules()]
    attributes = set(vars(base))
    unloaded = build_adapter(base).unload()
    assert [name for name, _ in unloaded.named_modules()] == names
    assert set(vars(unloaded)) == attributes
    assert not unloaded._forward_pre_hooks and not unloaded.model._forward_pre_hooks
    assert torch.equal(logits(unloaded, ids), expected)
    again = build_adapter(unloaded)
    assert torch.equal(logits(again, ids), logits(build_adapter(build_model()), ids))


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_and_harms_nothing(ids, merge):
    model = build_adapter(build_model())
    expected = logits(model, ids)
    with pytest.raises(ValueError, match="cannot be merged into the base model"):
        getattr(model, merge)()
    assert torch.equal(logits(model, ids), expected)


def test_a_copy_is_independent(ids):
    model = build_adapter(build_model())
    other = copy.deepcopy(model)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    got = other.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(got, expected)
    base = other.unload()
    assert base is not model.get_base_model()
    assert torch.equal(
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0), expected
    )


def test_a_low_precision_base_keeps_a_float32_adapter(ids):
    model = build_adapter(build_model().to(torch.bfloat16))
    numbers = {
        name: p.clone() for name, p in model.named_parameters() if "intv" in name
    }
    model.to(torch.float16).to(torch.bfloat16)
    for name, number in numbers.items():
        assert number.dtype == torch.float32
        assert torch.equal(model.get_parameter(name), number)
    assert logits(model, ids).dtype == torch.bfloat16


def test_an_adapter_added_to_a_model_at_work_does_not_drop(ids):
    model = build_adapter(build_model(), dropout=0.5)
    assert torch.equal(logits(model, ids), logits(model, ids))
    fresh = get_peft_model(build_model().eval(), LoreftConfig(dropout=0.5))
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, fresh(ids).logits)


def test_only_the_adapter_gets_gradients(ids):
    model = build_adapter(build_model(), tied_weights=False, positions="f2+l2")
    labels = ids.clone()
    labels[:, :6] = -100
    model(ids, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".intv_" in name), name
        # After the last layer, nothing reads the prompt's first tokens.
        if ".intv_" in name and f"layers.{LAYERS - 1}.intv_0" not in name:
            assert parameter.grad.abs().sum() > 0, name


def test_positions_of_a_callers_own_are_refused(tokens):
    model = build_adapter(build_model())
    for name in ("intervention_locations", "unit_locations"):
        with pytest.raises(ValueError, match=f"{name}: positions are found in every b"):
            model(tokens(1, 9), **{name: [[[0, 1]]]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [3]}, "layers: 3 in .* is out of range, the base model has 3"),
        (
            {"component": "model.layers[3].output"},
            "names layer 3, and the base model",
        ),
        ({"component": "model.layers.2.mlp.output"}, r"stands in brackets: \[2\]"),
        ({"rank": 33}, "rank: 33 is larger than the hidden size 32"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(build_model(), LoreftConfig(**settings))


def test_models_without_decoder_layers_are_refused():
    t5 = AutoConfig.for_model("t5", vocab_size=8, d_model=8, d_ff=8, num_layers=1)
    with pytest.raises(
        ValueError, match="T5ForConditionalGeneration is an encoder-dec"
    ):
        get_peft_model(AutoModelForSeq2SeqLM.from_config(t5), LoreftConfig())
    model = build_model()
    model.config.num_hidden_layers = 17
    with pytest.raises(ValueError, match="found no list of 17 layers"):
        get_peft_model(model, LoreftConfig())


def test_weights_of_another_base_are_refused(tmp_path):
    build_adapter(build_model()).save_pretrained(tmp_path)
    wider = build_model(hidden_size=64)
    with pytest.raises(ValueError, match="load it on the base model it was trained on"):
        PeftModel.from_pretrained(wider, tmp_path)


def test_other_modules_are_trained_and_saved_with_it(tmp_path, ids):
    config = LoreftConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model = get_peft_model(build_model(), config)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model(), tmp_path)
    assert torch.equal(logits(loaded, ids), expected)
