"""Embeddings and heads that are trained whole and saved with the adapter."""

import pytest
import torch
from conftest import build_adapter, build_model
from peft import LoraConfig, PeftModel, get_peft_model, peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl_reft import LoreftConfig
from axolotl_reft.tuner.trained_modules import same_modules

EMBEDDINGS = ["embed_tokens", "lm_head"]


def trained(model):
    return {
        name.split(".modules_to_save")[0].rsplit(".", 1)[-1]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "modules_to_save" in name
    }


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_of_a_grown_vocabulary_come_back_on_a_plain_base(
    tied, tmp_path, tokens
):
    grown = build_model(tie_word_embeddings=tied)
    grown.resize_token_embeddings(70, mean_resizing=False)
    model = build_adapter(grown, modules_to_save=list(EMBEDDINGS))
    assert trained(model) == ({"embed_tokens"} if tied else set(EMBEDDINGS))
    ids = tokens(2, 9)
    ids[:, 4] = 69
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved["base_model.model.model.embed_tokens.weight"].shape == (70, 32)
    plain = build_model(tie_word_embeddings=tied)
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        expected = model(ids).logits
        assert expected.shape[-1] == 70
        assert torch.equal(again(ids).logits, expected)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("names", [EMBEDDINGS, ["lm_head"], ["embed_tokens"]])
def test_a_trained_matrix_is_saved_once(names, old, tmp_path, tokens, monkeypatch):
    build_model().save_pretrained(tmp_path / "base")
    grown = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager"
    )
    grown.resize_token_embeddings(70, mean_resizing=False)
    model = build_adapter(grown, modules_to_save=list(names))
    if old:  # what PEFT itself writes
        plain = peft_model.get_peft_model_state_dict.__wrapped__
        monkeypatch.setattr(peft_model, "get_peft_model_state_dict", plain)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    others = sorted(key for key in keys if "intv_" not in key)
    if old:
        assert len(others) == 2 + 2 * len(names)
    else:
        stem = "base_model.model."
        assert others == [f"{stem}lm_head.weight", f"{stem}model.embed_tokens.weight"]
    again = PeftModel.from_pretrained(build_model(), tmp_path).eval()
    ids = tokens(2, 9)
    ids[:, 4] = 69
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_another_methods_adapters_are_saved_as_pefts(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    lora = get_peft_model(build_model(), config)
    lora.save_pretrained(tmp_path, save_embedding_layers=True)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.lm_head.original_module.weight" in keys


def test_tied_embeddings_are_one_while_they_are_trained(tokens):
    model = build_adapter(
        build_model(tie_word_embeddings=True), modules_to_save=["lm_head"]
    )
    ids = tokens(2, 9)
    before = model(ids).logits
    embeddings = model.get_input_embeddings()
    copy = embeddings.modules_to_save["default"].weight
    assert copy.requires_grad
    with torch.no_grad():
        copy.mul_(2)
    after = model(ids).logits
    head = model.base_model.model.lm_head
    h = torch.randn(1, 1, 32)
    assert torch.allclose(head(h), h @ copy.T)
    assert not torch.allclose(before, after)


def test_the_final_norm_can_be_trained(tmp_path, tokens):
    model = build_adapter(build_model(), modules_to_save=["model.norm"])
    assert trained(model) == {"norm"}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build_model(), tmp_path).eval()
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["embed_token"],
            "'embed_token' is not a module of .*mean 'embed_tokens'",
        ),
        (["mlp"], "'mlp' matches 'model.layers.0.mlp', within the layers"),
        (["norm"], "'norm' matches 'model.layers.0.input_layernorm', within"),
        (["layers"], "'layers' matches 'model.layers', within the layers"),
    ],
)
def test_other_names_are_refused(names, message):
    config = LoreftConfig(task_type="CAUSAL_LM", modules_to_save=names)
    with pytest.raises(ValueError, match=f"modules_to_save: {message}"):
        get_peft_model(build_model(), config)


def test_settings_that_train_the_same_modules():
    assert same_modules(None, ["classifier", "score"], [])
    assert not same_modules(["lm_head"], EMBEDDINGS, [])
    assert same_modules(["embed_tokens"], EMBEDDINGS, EMBEDDINGS)
    assert same_modules(["lm_head"], ["embed_tokens"], EMBEDDINGS)
    assert not same_modules([], EMBEDDINGS, EMBEDDINGS)
