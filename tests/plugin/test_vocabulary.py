"""What makes axolotl resize the embeddings: trained and saved with the adapter, or
refused."""

import pytest
from axolotl.cli.config import load_cfg
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from training import train
from transformers import AutoModelForCausalLM
from workspace import build_workspace

from axolotl_reft.plugin.plugin import LoreftPlugin

# The tokenizer of the workspace has 31 tokens, and its base as many rows.
ENLARGED = [
    ({"special_tokens": {"additional_special_tokens": ["<call>"]}}, 32),
    ({"special_tokens": {"pad_token": "<padding>"}}, 32),
    ({"resize_token_embeddings_to_32x": True}, 32),
]
BOTH = ["embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return build_workspace(tmp_path_factory.mktemp("vocabulary"))


def check(config, **changes):
    LoreftPlugin().load_datasets(load_cfg(str(config), **changes))


@pytest.mark.parametrize(("changes", "tokens"), ENLARGED)
def test_new_rows_of_embeddings_are_refused_where_they_would_be_lost(
    changes, tokens, config
):
    message = (
        f"the tokenizer has {tokens} tokens and the base model's embeddings 31 rows: "
        r"axolotl resizes them.*write loreft: modules_to_save: \[embed_tokens, lm_head"
    )
    with pytest.raises(ValueError, match=message):
        check(config, **changes)
    with pytest.raises(ValueError, match=message):
        check(config, loreft={"modules_to_save": ["lm_head"]}, **changes)
    check(config, loreft={"modules_to_save": BOTH}, **changes)


def test_special_tokens_that_the_tokenizer_has_change_nothing(config):
    check(config, special_tokens={"pad_token": "<unk>", "eos_token": "</s>"})


@pytest.mark.slow
def test_new_rows_are_trained_and_saved_with_the_adapter(config, tmp_path):
    model, losses = train(
        config,
        6,
        resize_token_embeddings_to_32x=True,
        loreft={"positions": "f2+l2", "modules_to_save": BOTH},
        output_dir=str(tmp_path),
    )
    assert losses[-1] < losses[0]
    numbers = load_file(tmp_path / "adapter_model.safetensors")
    for name in BOTH:
        assert {v.shape[0] for k, v in numbers.items() if f".{name}." in k} == {32}
    base = AutoModelForCausalLM.from_pretrained(config.parent / "base")
    base.resize_token_embeddings(32, mean_resizing=False)
    again = PeftModel.from_pretrained(base, tmp_path)
    for ours, theirs in (
        (again.get_input_embeddings(), model.get_input_embeddings()),
        (again.get_output_embeddings(), model.get_output_embeddings()),
    ):
        assert_close(ours.weight, theirs.weight)
