"""LoRA beside LoReFT in one adapter: PEFT's numbers, one directory, one switch."""

import copy
import warnings

import pytest
import torch
from conftest import LAYERS, build_adapter, build_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl_reft import LoreftConfig, to_pyreft
from axolotl_reft.exchange.directory import export_adapter
from axolotl_reft.plugin.args import check_as_written
from axolotl_reft.saved.directory import check_adapter_fits
from axolotl_reft.tuner.lora import LayerLora

LORA = {"r": 3, "alpha": 7, "target_modules": ["q_proj", "down_proj"]}


def layers_of(model):
    return [m for m in model.modules() if type(m).__name__ == "LoreftDecoderLayer"]


def without_reft(model):
    """LoReFT's part made to add nothing, so that LoRA's is seen by itself."""
    with torch.no_grad():
        for layer in layers_of(model):
            for intervention in layer.intv_0.values():
                intervention.proj_weight.zero_()
    return model


def pefts_own(model, architecture, lora):
    """PEFT's LoRA with the same numbers on the same base."""
    targets = lora["target_modules"]
    config = LoraConfig(
        task_type="CAUSAL_LM", r=lora["r"], lora_alpha=lora["alpha"],
        lora_dropout=lora.get("dropout", 0.0), target_modules=targets,
        fan_in_fan_out=architecture == "gpt2",
    )  # fmt: skip
    theirs = get_peft_model(build_model(architecture), config).eval()
    pairs = []
    for ours, layer in zip(layers_of(model), decoder_layers(theirs), strict=True):
        lora = ours.intv_lora["default"]
        for path, module in layer.named_modules():
            if hasattr(module, "lora_A"):
                stem = path.replace(".", "_")
                for name in ("A", "B"):
                    number = lora.get_parameter(f"{stem}_{name}")
                    other = getattr(module, f"lora_{name}")["default"].weight
                    with torch.no_grad():
                        other.copy_(number)
                    pairs.append((number, other))
    assert pairs
    return theirs, pairs


def decoder_layers(peft_model):
    inner = peft_model.base_model.model
    return inner.transformer.h if hasattr(inner, "transformer") else inner.model.layers


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("llama", ["q_proj", "down_proj"]),
        ("qwen3_moe", ["o_proj", "v_proj"]),
        ("gpt2", ["c_attn", "mlp.c_proj"]),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("half", [False, True])
def test_it_is_pefts_lora(tokens, architecture, targets, dropout, half):
    lora = LORA | {"target_modules": targets, "dropout": dropout}
    model = build_adapter(
        build_model(architecture), intervention="direft", layers=[-1], lora=lora
    )
    theirs, pairs = pefts_own(without_reft(model), architecture, lora)
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[:, :6] = -100
    outputs = []
    for one in (model, theirs):
        one.train(dropout > 0)
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = one(ids, labels=labels)
        output.loss.backward()
        outputs.append(output.logits)
    assert torch.equal(*outputs)
    for ours, other in pairs:
        assert ours.grad.abs().sum() > 0
        assert torch.equal(ours.grad, other.grad)


def test_it_starts_as_pefts_and_at_the_base(tokens):
    ids = tokens(1, 8)
    lora = {"r": 4, "target_modules": "all-linear"}
    model = get_peft_model(
        build_model(), LoreftConfig(intervention="direft", layers=[0], lora=lora)
    )
    with torch.no_grad():
        got = without_reft(model).eval()(ids).logits
    assert torch.equal(got, build_model()(ids).logits)
    first = layers_of(model)[0].intv_lora["default"]
    assert first.scaling == 1.0
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    paths = [f"self_attn_{n}" for n in names]
    paths += [f"mlp_{n}" for n in ("gate_proj", "up_proj", "down_proj")]
    assert {n for n, _ in first.named_parameters()} == {
        f"{path}_{side}" for path in paths for side in "AB"
    }
    torch.manual_seed(0)
    mine = LayerLora({"q": (400, 300)}, r=8, alpha=8, dropout=0.0).q_A
    assert mine.abs().max() <= 400**-0.5  # kaiming_uniform_ with a = √5
    assert abs(mine.std().item() / (400**-0.5 / 3**0.5) - 1) < 0.05


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@torch.no_grad()
def test_both_are_saved_and_loaded_as_one_adapter(
    tmp_path, tokens, architecture, low_cpu_mem_usage
):
    ids = tokens(2, 9)
    base = build_model(architecture)
    settings = {"layers": [1], "lora": {"r": 2, "dropout": 0.1}}
    model = build_adapter(base, **settings)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(".intv_0." in key for key in saved) == 4
    assert len({key.split(".intv_lora.")[0] for key in saved}) == LAYERS + 4
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        loaded = PeftModel.from_pretrained(
            build_model(architecture),
            tmp_path / "adapter",
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
    assert torch.equal(loaded(ids).logits, expected)
    assert loaded.peft_config["default"].lora == {
        "r": 2, "alpha": 2, "dropout": 0.1, "target_modules": "all-linear"
    }  # fmt: skip
    build_model(architecture).save_pretrained(tmp_path / "base")
    named = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = build_adapter(named, **settings)
    expected = again(ids).logits
    again.save_pretrained(tmp_path / "adapter")
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(by_name(ids).logits, expected)


@torch.no_grad()
def test_one_switch_and_one_unload_for_both(tokens):
    ids = tokens(2, 9)
    base = build_model()
    expected = base(ids).logits
    model = build_adapter(base, layers=[1], lora=LORA)
    edited = model(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, edited)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, edited)
    q_proj = base.model.layers[0].self_attn.q_proj
    assert len(q_proj._forward_hooks) == 1
    unloaded = model.unload()
    assert torch.equal(unloaded(ids).logits, expected)
    assert not q_proj._forward_hooks
    assert torch.equal(copied(ids).logits, edited)


def test_a_generation_has_lora_at_every_step(tokens):
    """What is decoded on a cache is what a forward over it all says."""
    model = build_adapter(build_model(), positions="f2", lora=LORA)
    ids = tokens(2, 8)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    labels = cached.clone()
    labels[:, :8] = -100
    with torch.no_grad():
        logits = model(cached, labels=labels).logits
    assert torch.equal(logits[:, 7:-1].argmax(-1), cached[:, 8:])


@torch.no_grad()
def test_trls_copy_of_an_adapter_for_grpo_is_complete(tokens):
    """As GRPOTrainer makes its reference: parameters copied by name."""
    model = build_adapter(build_model(), intervention="direft", lora=LORA)
    expected = model(tokens(1, 8)).logits
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).copy_(parameter)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.add_(1.0)
    model.set_adapter("ref")
    assert torch.equal(model.eval()(tokens(1, 8)).logits, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("layers", ["all", [-1]])
def test_gradient_checkpointing_is_exact(tokens, use_reentrant, layers):
    ids = tokens(2, 10)
    labels = ids.clone()
    labels[:, :6] = -100
    model = build_adapter(build_model(), layers=layers, lora=LORA).train()

    def gradients():
        model.zero_grad()
        loss = model(ids, labels=labels).loss
        with torch.no_grad():
            model(tokens(3, 7, seed=1), labels=tokens(3, 7, seed=1))
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    got = gradients()
    assert any("layers.0.intv_lora" in name for name in got)
    for name, gradient in got.items():
        assert torch.equal(gradient, expected[name]), name
        if "intv_lora" in name:  # down to the lowest layer's
            assert gradient.abs().sum() > 0, name


@torch.no_grad()
def test_an_edited_output_is_that_of_the_sum(tokens):
    lora = LORA | {"target_modules": ["q_proj"]}
    settings = {"component": "query_output", "positions": "all", "layers": [0]}
    model = build_adapter(build_model(), lora=lora, **settings)
    layer = layers_of(model)[0]
    q_proj = layer.base_layer.self_attn.q_proj
    seen = {}
    q_proj.register_forward_hook(lambda m, a, out: seen.update(x=a[0], out=out))
    model(tokens(1, 8))
    total = torch.nn.functional.linear(seen["x"], q_proj.weight)
    total = total + layer.intv_lora["default"]("self_attn.q_proj", seen["x"])
    expected = layer.intv_0["default"](total)
    assert (seen["out"] - expected).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "gpt2"])
def test_rows_have_the_lora_of_their_adapters(tokens, architecture):
    model = build_adapter(build_model(architecture), layers=[1], lora={"r": 2})
    for seed, (name, settings) in enumerate(
        {"reft": {"layers": [0]}, "both": {"layers": [2], "lora": {"r": 5}}}.items()
    ):
        torch.manual_seed(seed)
        model.add_adapter(name, LoreftConfig(task_type="CAUSAL_LM", **settings))
    for parameter in model.parameters():
        if parameter.abs().sum() == 0:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = tokens(5, 9)
    rows = ["both", "__base__", "reft", "default", "both"]
    got = model.eval()(ids, adapter_names=rows).logits
    for row, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                assert torch.equal(got[row], model(ids).logits[row])
            continue
        model.set_adapter(name)
        alone = model(ids).logits
        assert (got[row] - alone[row]).abs().max() <= 1e-6 * alone.abs().max()
        with model.disable_adapter():
            assert (got[row] - model(ids).logits[row]).abs().max() > 1e-3
    # The key of a number does not depend on what else the base carries.
    model.delete_adapter("reft")
    model.set_adapter("both")
    fresh = build_adapter(build_model(architecture), layers=[2], lora={"r": 5})
    names = {n.replace(".both.", ".default.") for n, _ in model.named_parameters()}
    assert {n for n, _ in fresh.named_parameters()} <= names


def test_deleting_one_keeps_the_others_lora(tokens):
    model = build_adapter(build_model(), lora=LORA)
    other = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    model.add_adapter("other", LoreftConfig(task_type="CAUSAL_LM", lora=other))
    attention = layers_of(model)[0].base_layer.self_attn
    assert len(attention.q_proj._forward_hooks) == 1
    assert len(attention.v_proj._forward_hooks) == 1
    with torch.no_grad():
        expected = model.eval()(tokens(1, 8)).logits
        model.delete_adapter("other")
        assert torch.equal(model(tokens(1, 8)).logits, expected)
    assert len(attention.q_proj._forward_hooks) == 1
    assert not attention.v_proj._forward_hooks


def test_a_low_precision_base_keeps_it_in_float32(tokens):
    model = build_adapter(build_model().to(torch.bfloat16), lora=LORA)
    model.to(torch.float16).to(torch.bfloat16)
    numbers = [p for n, p in model.named_parameters() if "intv_lora" in n]
    assert numbers and all(p.dtype == torch.float32 for p in numbers)
    assert model(tokens(1, 8)).logits.dtype == torch.bfloat16


def test_weights_of_another_shape_are_refused(tmp_path):
    build_adapter(build_model(), lora=LORA).save_pretrained(tmp_path)
    wider = build_model(intermediate_size=80)
    message = r"down_proj_A has shape \(3, 48\), but .* model needs \(3, 80\); load"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(wider, tmp_path)


def test_a_module_that_is_not_there_is_refused():
    lora = {"target_modules": ["q_proj", "down_prj"]}
    message = (
        "lora: target_modules: 'down_prj' is no linear module of LlamaDecoderLayer. "
        "Did you mean 'down_proj'.* It has: self_attn.q_proj, "
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(build_model(), LoreftConfig(lora=lora))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (True, "lora: True is not a mapping; write for example lora: {r: 8}"),
        (8, "lora: 8 is not a mapping"),
        ({"rank": 4}, "lora: unknown key 'rank'.* Known keys: r, alpha, dropout"),
        ({"alpa": 4}, "lora: unknown key 'alpa'. Did you mean 'alpha'"),
        ({"lora_r": 4}, "lora: unknown key 'lora_r'. Did you mean 'r'"),
        ({"r": 0}, "lora: r: 0 is not a whole number of at least 1"),
        ({"r": 2.0}, "lora: r: 2.0 is not a whole number"),
        ({"r": True}, "lora: r: True is not a whole number"),
        ({"alpha": 0}, "lora: alpha: 0 is not a number from 1e-6 to"),
        ({"alpha": "16"}, "lora: alpha: '16' is not a number from 1e-6"),
        ({"alpha": float("nan")}, "lora: alpha: nan is not a number from 1e-6 to"),
        ({"alpha": float("inf")}, "lora: alpha: inf is not a number from 1e-6 to"),
        ({"dropout": 1}, "lora: dropout: 1 is not a number from 0 to"),
        ({"dropout": "0"}, "lora: dropout: '0' is not a number"),
        ({"target_modules": "q_proj"}, "'q_proj' is not a list of names; write for"),
        ({"target_modules": []}, r"target_modules: \[\] is not a list of names"),
        ({"target_modules": [3]}, r"target_modules: \[3\] is not a list of names"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_with_the_remedy(lora, message):
    with pytest.raises(ValueError, match=message):
        LoreftConfig(lora=lora)
    settings = {"adapter": "loreft", "loreft": {"lora": lora}}
    with pytest.raises(ValueError, match=message):
        check_as_written(settings)


def test_the_yaml_takes_it_in_the_block_and_not_at_the_top():
    settings = {"adapter": "loreft", "loreft": {"lora": {"r": 4}}}
    check_as_written(settings)
    check_as_written({"adapter": "loreft", "loreft": {"lora": {}}})
    with pytest.raises(ValueError, match="lora_r: 4 .* LoRA beside LoReFT"):
        check_as_written(settings | {"lora_r": 4})


def test_nothing_at_the_top_of_the_file_looks_like_loras():
    """axolotl's merge takes an adapter with `r` and `lora_alpha` for LoRA's."""
    stored = LoreftConfig(lora={"r": 4}).to_dict()
    assert not {"r", "lora_alpha"} & stored.keys()
    assert not any("lora_" in n for n, _ in _example().named_parameters())


def _example():
    return build_adapter(build_model(), lora=LORA)


def test_pyreft_has_no_place_for_it(tmp_path):
    model = _example()
    model.save_pretrained(tmp_path / "adapter")
    message = "has LoRA beside LoReFT .*, for which pyreft has no place; train one"
    with pytest.raises(ValueError, match=message):
        export_adapter(str(tmp_path / "adapter"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=message):
        to_pyreft(model)


def test_merging_is_refused():
    with pytest.raises(ValueError, match="cannot be merged into the base model"):
        _example().merge_and_unload()


def test_a_directory_is_checked_for_its_lora(tmp_path):
    build_adapter(build_model(), layers=[0], lora=LORA).save_pretrained(tmp_path)

    def check(layers):
        return check_adapter_fits(str(tmp_path), "lora_model_dir", 32, layers)

    assert check(LAYERS).lora["r"] == 3
    with pytest.raises(ValueError, match=r"holds LoRA in layers \[0, 1, 2\], but with"):
        check(LAYERS + 1)
