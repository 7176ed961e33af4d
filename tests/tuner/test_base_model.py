"""Models that an adapter cannot be made for, and what their owners read."""

from functools import partial
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import build_adapter, build_model
from packaging.version import Version
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from axolotl_reft import LoreftConfig
from axolotl_reft.tuner.base_model import free_name

LORA = LoraConfig(r=2, target_modules=["q_proj"])


def with_config(config):
    module = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    module.config = config
    return module


def timm_like():
    settings = {"hidden_sizes": [4, 4], "depths": [1, 1], "num_stages": 2}
    return AutoModel.from_config(AutoConfig.for_model("convnext", **settings))


NOT_TRANSFORMERS = {
    "plain": lambda: nn.Linear(4, 4),
    "Sequential": lambda: nn.Sequential(nn.Linear(4, 4)),
    "config of a dict": lambda: with_config({"num_hidden_layers": 3}),
    "config without layers": lambda: with_config(SimpleNamespace(hidden_size=4)),
    "compiled": lambda: torch.compile(build_model(), backend="eager"),
    "DataParallel": lambda: nn.DataParallel(build_model()),
}
MAKERS = {
    "get_peft_model": lambda model, _: get_peft_model(model, LoreftConfig()),
    "inject": lambda model, _: inject_adapter_in_model(LoreftConfig(), model),
    "from_pretrained": PeftModel.from_pretrained,
}


@pytest.mark.parametrize("make", list(MAKERS))
@pytest.mark.parametrize("module", list(NOT_TRANSFORMERS))
def test_a_module_that_is_not_transformers_is_refused(module, make, tmp_path):
    model = NOT_TRANSFORMERS[module]()
    build_adapter(build_model()).save_pretrained(tmp_path)
    message = f"a transformers model, and got a {type(model).__name__}; load one with"
    with pytest.raises(ValueError, match=message):
        MAKERS[make](model, tmp_path)


@pytest.mark.parametrize("make", list(MAKERS))
def test_a_config_without_layers_of_one_width_is_refused(make, tmp_path):
    build_adapter(build_model()).save_pretrained(tmp_path)
    message = "config of ConvNextModel has no (num_hidden_layers|hidden_size); use a ca"
    with pytest.raises(ValueError, match=message):
        MAKERS[make](timm_like(), tmp_path)


# transformers 5.24 asks for a PEFT that is not out.
TRANSFORMERS_OWN = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason="transformers' own adapters need a newer PEFT",
)


def prompt_learning(kind):
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return get_peft_model(build_model(), config)


IA3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
ADAPTED = {
    "LORA": lambda: get_peft_model(build_model(), LORA),
    "IA3": lambda: get_peft_model(build_model(), IA3),
    "PROMPT_TUNING": lambda: prompt_learning(PromptTuningConfig),
    "PREFIX_TUNING": lambda: prompt_learning(PrefixTuningConfig),
    "LORA, mixed": lambda: get_peft_model(build_model(), LORA, mixed=True),
    "LORA, injected": lambda: inject_adapter_in_model(LORA, build_model()),
    "LORA, unwrapped": lambda: get_peft_model(build_model(), LORA).get_base_model(),
    "LORA, tuner": lambda: get_peft_model(build_model(), LORA).base_model,
}


@pytest.mark.parametrize("name", ["default", "second"])
@pytest.mark.parametrize("adapted", list(ADAPTED))
def test_a_model_with_another_methods_adapter_is_refused(adapted, name):
    model = ADAPTED[adapted]()
    before = dict(model.peft_config)
    method = adapted.partition(",")[0]
    message = (
        rf"without adapters of other PEFT methods, and got a {type(model).__name__} "
        rf"with 'default' \({method}\): .*merge_and_unload.* LoreftConfig\(lora="
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoreftConfig(), adapter_name=name)
    assert model.peft_config == before


@TRANSFORMERS_OWN
def test_transformers_cannot_add_it_beside_lora(tmp_path):
    model = build_model()
    model.add_adapter(LORA)
    build_adapter(build_model()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM with 'default' \(LORA\)"):
        model.add_adapter(LoreftConfig(), "second")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM with 'default' \(LORA\)"):
        model.load_adapter(tmp_path, "second")


def test_a_model_with_a_loreft_adapter_gets_another_by_add_adapter():
    model = build_adapter(build_model())
    with pytest.raises(ValueError, match=r"has a LoReFT adapter .*add_adapter\(name"):
        get_peft_model(model, LoreftConfig(), adapter_name="second")
    model.add_adapter("second", LoreftConfig(task_type="CAUSAL_LM"))
    get_peft_model(model.unload(), LoreftConfig())


@torch.no_grad()
def test_a_merged_lora_is_a_base_like_any_other(tmp_path, tokens):
    """As the refusal advises."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    merged = get_peft_model(build_model(), lora).merge_and_unload()
    weights = {key: tensor.clone() for key, tensor in merged.state_dict().items()}
    model = build_adapter(merged)
    expected = model(tokens(2, 9)).logits
    model.save_pretrained(tmp_path)
    again = build_model()
    again.load_state_dict(weights)
    again = PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(again(tokens(2, 9)).logits, expected)


@pytest.mark.parametrize("other", ["LoRA around", "LoRA added", "LoRA loaded", "mixed"])
def test_peft_refuses_lora_on_a_model_with_loreft(other, tmp_path):
    model = build_adapter(build_model())
    get_peft_model(build_model(), LORA).save_pretrained(tmp_path)
    ways = {
        "LoRA around": lambda: get_peft_model(model, LORA),
        "LoRA added": lambda: model.add_adapter("second", LORA),
        "LoRA loaded": lambda: model.load_adapter(tmp_path, "second"),
        "mixed": lambda: get_peft_model(build_model(), LoreftConfig(), mixed=True),
    }
    with pytest.raises(
        ValueError, match="No modules|not found|Cannot combine|not comp"
    ):
        ways[other]()


@TRANSFORMERS_OWN
@torch.no_grad()
def test_transformers_own_adapters(tmp_path, tokens):
    """``model.add_adapter`` and ``load_adapter``, without a PeftModel."""
    model, expected = build_model(), {}
    for name, rank in (("default", 8), ("second", 2)):
        model.add_adapter(LoreftConfig(task_type="CAUSAL_LM", rank=rank), name)
        expected[name] = model(tokens(2, 9)).logits
        model.save_pretrained(tmp_path / name)
    for name in expected:
        model.set_adapter(name)
        assert torch.equal(model(tokens(2, 9)).logits, expected[name])
        loaded = build_model()
        loaded.load_adapter(tmp_path / name)
        assert torch.equal(loaded(tokens(2, 9)).logits, expected[name])
    model.disable_adapters()
    assert torch.equal(model(tokens(2, 9)).logits, build_model()(tokens(2, 9)).logits)


def test_a_free_name_is_free():
    assert free_name(()) == "default"
    assert free_name(("default", "adapter_1")) == "adapter_2"


def test_a_name_that_is_taken_is_refused_with_another():
    model = build_model()
    model.default = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'default' .*choose another, such as 'adapte"):
        get_peft_model(model, LoreftConfig())
    get_peft_model(model, LoreftConfig(), adapter_name="adapter_1")


def test_a_forward_of_any_arguments_on_the_base_changes_nothing(tokens):
    """As a library that counts or times forwards puts it there."""
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[:, :5] = -100
    given = ids, None, None, None, None, labels
    expected = build_adapter(build_model()).get_base_model()(*given).logits
    base = build_model()
    for module in (base, base.model):
        module.forward = partial(forward_of, module.forward)
    got = build_adapter(base).get_base_model()(*given).logits
    assert torch.equal(got, expected)


def forward_of(plain, *args, **kwargs):
    return plain(*args, **kwargs)
