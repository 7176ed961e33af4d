"""Embeddings and heads that are trained whole and saved with the adapter."""

import pytest
import torch
from conftest import build_adapter, build_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from axolotl_reft import LoreftConfig
from axolotl_reft.trained_modules import same_modules

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
