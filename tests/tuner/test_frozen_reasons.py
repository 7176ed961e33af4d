"""Every reason for one part: ``auto`` says it and computes as before, true refuses."""

import re

import pytest
import torch
from conftest import build_adapter, build_model
from frozen_prompts import (
    TOLERANCE,
    difference,
    packed,
    ragged,
    results,
    two_parts,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
)

RAGGED = ragged([20, 17, 9], [14, 10, 4])
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MAMBA = {"mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_expand": 2}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
SHARED = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
}
CHUNKED = {
    "attention_chunk_size": 8,
    "num_local_experts": 2,
    "intermediate_size_mlp": 48,
}


@pytest.fixture(autouse=True)
def _always_worth_it(monkeypatch):
    rule = "axolotl_reft.tuner.frozen_prompt.saves_time"
    monkeypatch.setattr(rule, lambda *args: True)


def build(kind, kind_of_model=AutoModelForCausalLM, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | settings)
    return kind_of_model.from_config(config)


def trained(base=None, **settings):
    base = build_model() if base is None else base
    return build_adapter(base, **{"positions": "l3"} | settings).train()


def assert_told(model, batch, reason, checks=False):
    """``auto`` computes as it would, and says why; true raises before anything."""
    expected = results(model, batch)
    with two_parts(model, "auto", checks=checks) as seen:
        assert difference(results(model, batch), expected) == 0
        del seen.numbers[:]
        assert difference(results(model, batch), expected) == 0
        assert [parts for _, parts in seen.numbers] == [False]
    assert len(seen.told) == 1
    assert re.fullmatch(
        f"frozen prompt: computed with the rest, since {reason}", *seen.told
    )
    with pytest.raises(ValueError, match=f"{reason}; use frozen_prompt: auto"):
        with two_parts(model, True, checks=checks):
            results(model, batch)
    assert difference(results(model, batch), expected) == 0, "nothing is left behind"


BASES = {
    "a window that depends on the length": (
        lambda: build("phi3", rope_parameters=LONG),
        "longrope rotary embeddings depend on the whole length",
    ),
    "dynamic": (
        lambda: build("llama", rope_parameters=DYNAMIC),
        "dynamic rotary embeddings depend on the whole length",
    ),
    "hybrid": (
        lambda: build("bamba", attn_layer_indices=[1], **MAMBA),
        r"a cache has more than keys and values \(\w*Linear\w*\)",
    ),
    "recurrent": (
        lambda: build("falcon_mamba", state_size=8),
        "FalconMambaModel takes no cache and no position_ids",
    ),
    "a state that takes a cache": (
        lambda: build("recurrent_gemma", lru_width=32),
        "layers of RecurrentGemmaModel carry a state",
    ),
    "chunked": (
        lambda: build("llama4_text", **CHUNKED),
        "Llama4ForCausalLM holds a text model within another",
    ),
    "dropout": (
        lambda: build_model("gpt2"),
        r"the base is random in training \(\w+: 0.1\)",
    ),
    "routing": (
        lambda: build("mixtral", num_local_experts=3, output_router_logits=True),
        "the loss depends on all tokens' routing",
    ),
    "shared keys": (
        lambda: build("gemma4_text", global_head_dim=8, **SHARED),
        "layers share keys and values",
    ),
}


@pytest.mark.parametrize("name", list(BASES))
def test_of_a_base(name):
    make, reason = BASES[name]
    torch.manual_seed(0)
    if name == "dropout":
        assert_dropout_told(trained(make()), reason)
    else:
        assert_told(trained(make()), RAGGED, reason)


def assert_dropout_told(model, reason):
    assert_told(model, RAGGED, reason)
    model.eval()  # there is none in evaluation
    expected = results(model, RAGGED)
    with two_parts(model) as seen:
        assert difference(results(model, RAGGED), expected) < TOLERANCE
        assert all(parts for _, parts in seen.numbers)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_of_an_encoder(kind):
    base = build(kind, AutoModelForTokenClassification, **NO_DROPOUT)
    model = trained(base, task_type="TOKEN_CLS")
    batch = RAGGED | {"labels": RAGGED["labels"].clamp(max=1)}
    assert_told(model, batch, r"\w+Model is bidirectional")


def test_dropout_of_a_classifier_is_not_the_layers():
    model = trained(build_model("gpt_neox"))
    assert model.config.classifier_dropout == 0.1
    with two_parts(model) as seen:
        results(model, RAGGED)
    assert all(parts for _, parts in seen.numbers)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lora": {"r": 2}}, "'default' has LoRA, which changes every token"),
        (
            {"modules_to_save": ["embed_tokens"]},
            "'default' has embeddings, which change every token",
        ),
    ],
    ids=str,
)
def test_of_an_adapter(settings, reason):
    assert_told(trained(**settings), RAGGED, reason)


def test_a_trained_head_alone_is_in_no_ones_way():
    model = trained(modules_to_save=["lm_head"])
    expected = results(model, RAGGED)
    assert any("lm_head" in name for name in expected.gradients)
    with two_parts(model) as seen:
        assert difference(results(model, RAGGED), expected) < TOLERANCE
        assert all(parts for _, parts in seen.numbers)


def test_a_base_that_is_trained():
    model = trained()
    layer = model.get_base_model().model.layers[1]
    layer.base_layer.mlp.down_proj.weight.requires_grad_()
    reason = r"layers.1.base_layer.mlp.down_proj.weight of the base is trained"
    assert_told(model, RAGGED, reason)


@pytest.mark.parametrize("positions", ["f2", "f2+l3", "all"])
def test_of_positions(positions):
    model = trained(positions=positions)
    reason = rf"positions: {re.escape(positions)} edits the prompt's beginning"
    with two_parts(model, "auto") as seen:
        assert seen.frozen is None
        results(model, RAGGED)
    assert re.search(reason, *seen.told)
    with pytest.raises(ValueError, match=r"needs positions: l<m>.*: auto, or l7"):
        with two_parts(model, True):
            pass


FORWARDS = {
    "attentions": ({"output_attentions": True}, "output_attentions is asked for"),
    "hidden states": (
        {"output_hidden_states": True},
        "all hidden states are asked for",
    ),
    "mask of samples": (
        {"attention_mask": RAGGED["attention_mask"] * 2},
        "the attention mask is not one of 0 and 1 for each token",
    ),
    "another tensor": (
        {"seq_idx": torch.zeros(3, 20, dtype=torch.long)},
        "the model is given seq_idx",
    ),
}


@pytest.mark.parametrize("name", list(FORWARDS))
def test_of_a_forward(name):
    more, reason = FORWARDS[name]
    assert_told(trained(), RAGGED | more, reason)


UNASKED = {
    "inputs_embeds": lambda model, ids: {
        "inputs_embeds": model.get_input_embeddings()(ids),
        "attention_mask": RAGGED["attention_mask"],
        "labels": RAGGED["labels"],
    },
    "a cache": lambda model, ids: RAGGED | {"past_key_values": DynamicCache()},
    "use_cache": lambda model, ids: RAGGED | {"use_cache": True},
}


@pytest.mark.parametrize("name", list(UNASKED))
def test_of_forwards_of_which_nobody_asks(name):
    """They are computed as they were, with true too, and nothing is told."""
    model = trained()
    make = UNASKED[name]
    expected = results(model, make(model, RAGGED["input_ids"]))
    with two_parts(model) as seen:
        got = results(model, make(model, RAGGED["input_ids"]))
        assert difference(got, expected) == 0
        assert seen.told == []
        assert len(seen.numbers) == 1


def test_generation_is_as_it_was(tokens):
    model = trained().eval()
    ids = tokens(2, 9)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    with two_parts(model) as seen:
        results(model.train(), RAGGED)
        got = model.eval().generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, expected)
    assert len(seen.told) == 1


def test_batches_of_rows_with_adapters_of_their_own():
    model = trained().eval()
    names = ["default", "__base__", "default"]
    batch = {k: RAGGED[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**batch, adapter_names=names, use_cache=False).logits
        with two_parts(model) as seen:
            got = model(**batch, adapter_names=names, use_cache=False).logits
    assert torch.equal(got, expected)
    assert seen.told == []


def test_compiled_layers():
    model = trained()
    expected = results(model, RAGGED)
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="eager")
    with two_parts(model, "auto") as seen:
        assert difference(results(model, RAGGED), expected) < TOLERANCE
    assert seen.told[0].endswith("since layers are compiled")


def test_a_compiled_model():
    model = trained()
    expected = results(model, RAGGED)
    with two_parts(model) as seen:
        compiled = torch.compile(model, backend="eager")
        loss = compiled(**RAGGED).loss
    assert (loss - expected.loss).abs() < TOLERANCE
    assert seen.told == []


def test_a_reward_model_computes_in_two_parts():
    base = build("llama", AutoModelForSequenceClassification, num_labels=1)
    model = trained(base, task_type="SEQ_CLS")
    batch = {k: RAGGED[k] for k in ("input_ids", "attention_mask")}

    def scores():
        model.zero_grad()
        logits = model(**batch).logits
        logits.square().sum().backward()
        named = model.named_parameters()
        return logits.detach(), [p.grad.clone() for _, p in named if p.grad is not None]

    expected, gradients = scores()
    with two_parts(model) as seen:
        for _ in range(2):
            got, found = scores()
            assert (got - expected).abs().max() < TOLERANCE
            for ours, theirs in zip(found, gradients, strict=True):
                assert (ours - theirs).abs().max() < TOLERANCE * gradients[
                    0
                ].abs().max()
    assert all(parts for _, parts in seen.numbers)


BY_ITSELF = r"the base by itself is off by \d+% in two parts"


@pytest.mark.parametrize("kind", ["roberta", "megatron-bert"])
def test_of_a_base_that_is_not_the_same_in_two_parts(kind):
    """RoBERTa numbers its positions from 2 unless they are given, and Megatron-BERT's
    tokens see later ones. Nothing in their classes says so."""
    base = build(kind, is_decoder=True, **NO_DROPOUT)
    assert_told(trained(base), RAGGED, BY_ITSELF, checks=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_is_checked_once_for_each_form_of_batch(dtype):
    model = trained()
    model.get_base_model().to(dtype)
    right, left = RAGGED, ragged([20, 17, 9], [14, 10, 4], left=True)
    rows = packed([(15, 10), (5, 3)], [(12, 9), (8, 5)])
    with two_parts(model, checks=True) as seen:
        for batch in (right, left, rows):
            for expected in (True, False):
                del seen.numbers[:]
                results(model, batch)
                whole = [parts for _, parts in seen.numbers].count(False)
                assert whole == expected
