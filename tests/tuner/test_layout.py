"""Hidden states that are not (batch, tokens, width): right, or refused."""

import copy

import pytest
import torch
from conftest import build_adapter, build_model
from plain_reference import edited_by_hand, edited_tokens
from torch import nn
from transformers import (
    BigBirdConfig,
    BigBirdForMaskedLM,
    CpmAntConfig,
    CpmAntForCausalLM,
    GitConfig,
    GitForCausalLM,
    LayoutLMv3Config,
    LayoutLMv3ForTokenClassification,
    LongformerConfig,
    LongformerForMaskedLM,
    VisualBertConfig,
    VisualBertForPreTraining,
    XLNetConfig,
    XLNetLMHeadModel,
)

ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "sep_token_id": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}
TOKENS_BESIDE = {"xlnet": 9, "longformer": 20, "big_bird": 101}


def build(architecture):
    torch.manual_seed(0)
    if architecture == "longformer":
        config = LongformerConfig(**ENCODER, attention_window=8)
        return LongformerForMaskedLM(config).eval()
    if architecture == "big_bird":
        blocks = {"block_size": 8, "num_random_blocks": 1}
        return BigBirdForMaskedLM(BigBirdConfig(**ENCODER | blocks)).eval()
    config = XLNetConfig(
        vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48, dropout=0.0,
        initializer_range=0.2,
    )  # fmt: skip
    return XLNetLMHeadModel(config).eval()


def adapt(base, **settings):
    defaults = {"tied_weights": False, "task_type": None}
    return build_adapter(copy.deepcopy(base), **defaults | settings)


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("architecture", list(TOKENS_BESIDE))
def test_each_row_is_edited_at_its_tokens(tokens, architecture, rows, positions):
    """Padded inside of the model, or time first, also with as many rows as tokens."""
    base, width = build(architecture), TOKENS_BESIDE[architecture]
    adapter = adapt(base, positions=positions)
    ids = tokens(rows, width)
    places = {"xlnet": lambda token: token}
    place = places.get(architecture, lambda token: (slice(None), token))
    with edited_by_hand(base, adapter, edited_tokens(width, positions), place) as hand:
        expected = torch.cat([hand(row[None]).logits for row in ids])
        states = hand(ids[:1], output_hidden_states=True).hidden_states
    with torch.no_grad():
        got = adapter(input_ids=ids, output_hidden_states=True)
    assert torch.allclose(got.logits, expected, atol=2e-5)
    assert not torch.allclose(got.logits, base(ids).logits, atol=0.1)
    for h, other in zip(got.hidden_states, states, strict=True):
        assert torch.allclose(h[:1], other, atol=2e-5)


@pytest.mark.filterwarnings("ignore:LoReFT. a training forward without labels")
@pytest.mark.parametrize("architecture", list(TOKENS_BESIDE))
def test_gradients_are_those_of_the_rows_alone(tokens, architecture):
    base, width = build(architecture), TOKENS_BESIDE[architecture]
    model = adapt(base).train()
    ids = tokens(2, width)

    def gradients(*batches):
        model.zero_grad()
        for batch in batches:
            model(input_ids=batch).logits.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    torch.manual_seed(0)
    together = gradients(ids)
    for one, other in zip(together, gradients(ids[:1], ids[1:]), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["longformer", "xlnet"])
def test_rows_with_an_adapter_each(tokens, architecture):
    """Also with positions: all, of which every token is edited but in some rows."""
    base, width = build(architecture), TOKENS_BESIDE[architecture]
    adapter = adapt(base, positions="all")
    ids = tokens(2, width)
    with torch.no_grad():
        got = adapter(input_ids=ids, adapter_names=["__base__", "default"]).logits
        expected = torch.cat([base(ids[:1]).logits, adapter(ids[1:]).logits])
    assert torch.allclose(got, expected, atol=2e-5)


IMAGES = {"image_size": 16, "patch_size": 8}
TOWER = {key: ENCODER[key] for key in list(ENCODER)[1:5]}


def build_with_other_vectors(architecture):
    """A model that puts vectors beside the tokens', what it makes them of for two rows,
    and the column of the first token."""
    torch.manual_seed(0)
    if architecture == "cpmant":
        config = CpmAntConfig(
            vocab_size=64, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48,
            num_hidden_layers=2, prompt_length=4, prompt_types=4, segment_types=4,
        )  # fmt: skip
        base, extra, first = CpmAntForCausalLM(config), {}, 4
        for parameter in base.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    elif architecture == "git":
        base = GitForCausalLM(GitConfig(vision_config=TOWER | IMAGES, **ENCODER))
        extra, first = {"pixel_values": torch.randn(2, 3, 16, 16)}, 5
    elif architecture == "layoutlmv3":
        boxes = {"coordinate_size": 6, "shape_size": 4, "input_size": 16}
        config = LayoutLMv3Config(**ENCODER | boxes | {"patch_size": 8})
        base, first = LayoutLMv3ForTokenClassification(config), 0
        extra = {
            "pixel_values": torch.randn(2, 3, 16, 16),
            "bbox": torch.arange(72).view(2, 9, 4),
        }
    else:
        config = VisualBertConfig(**ENCODER, visual_embedding_dim=16)
        base, first = VisualBertForPreTraining(config), 0
        extra = {"visual_embeds": torch.randn(2, 4, 16)}
    return base.eval(), extra, first


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
@pytest.mark.parametrize("architecture", ["cpmant", "git", "layoutlmv3", "visual_bert"])
@torch.no_grad()
def test_vectors_beside_those_of_the_tokens_are_left_alone(
    tokens, architecture, positions
):
    base, extra, first = build_with_other_vectors(architecture)
    adapter, ids = adapt(base, positions=positions), tokens(2, 9)
    got = adapter(input_ids=ids, **extra)[0]

    def place(token):
        return slice(None), token + first

    with edited_by_hand(base, adapter, edited_tokens(9, positions), place) as hand:
        expected = hand(input_ids=ids, **extra)[0]
    assert torch.allclose(got, expected, atol=2e-5)
    assert not torch.allclose(got, base(input_ids=ids, **extra)[0], atol=0.1)


class Wrapped(nn.Module):
    """A layer whose output is wrapped by a function."""

    def __init__(self, layer, wrap):
        super().__init__()
        self.layer, self.wrap = layer, wrap

    def forward(self, hidden_states, **kwargs):
        return self.wrap(self.layer(hidden_states, **kwargs))


def wrap_last_layer(model, wrap):
    model.model.layers[-1] = Wrapped(model.model.layers[-1], wrap)
    return model


@pytest.mark.parametrize(
    ("wrap", "got"),
    [
        (lambda h: torch.stack([h, h]), r"\(2, 2, 9, 32\)"),
        (lambda h: torch.stack([h, h], 2), r"\(2, 9, 2, 32\)"),
        (lambda h: torch.cat([h, h], 1), r"\(2, 18, 32\)"),
        (lambda h: h.transpose(0, 1), r"\(9, 2, 32\)"),
        (lambda h: h.transpose(1, 2), r"\(2, 32, 9\)"),
        (lambda h: h[..., :16], r"\(2, 9, 16\)"),
        (lambda h: h.flatten(0, 1)[:-1], r"\(17, 32\)"),
        (lambda h: {"feature_map": h}, "dict"),
    ],
    ids=[
        "streams",
        "inner-streams",
        "twice",
        "time",
        "width",
        "narrow",
        "flat",
        "dict",
    ],
)
@pytest.mark.parametrize("positions", ["f2+l3", "all"])
def test_hidden_states_of_another_shape_are_refused(tokens, wrap, got, positions):
    adapter = adapt(wrap_last_layer(build_model(), wrap), positions=positions)
    with pytest.raises(RuntimeError, match=rf"is {got}, where \(2, 9, 32\).*component"):
        adapter(tokens(2, 9))


RETURNS = {
    "tuple": (lambda h: (h, None), lambda out: out[0]),
    "list": (lambda h: [h, None], lambda out: out[0]),
    "dict": (lambda h: {"hidden_states": h}, lambda out: out["hidden_states"]),
    "flat": (lambda h: h.flatten(0, 1), lambda out: out.unflatten(0, (2, 9))),
}


@pytest.mark.parametrize("kind", list(RETURNS))
@pytest.mark.parametrize("positions", ["f2+l3", "all"])
@torch.no_grad()
def test_hidden_states_are_found_in_what_a_layer_returns(tokens, kind, positions):
    wrap, unwrap = RETURNS[kind]
    expected = adapt(build_model(), positions=positions)(tokens(2, 9)).logits
    adapter = adapt(wrap_last_layer(build_model(), wrap), positions=positions)
    layer = adapter.base_model.model.model.layers[-1]
    layer.register_forward_hook(lambda module, args, output: unwrap(output))
    assert torch.allclose(adapter(tokens(2, 9)).logits, expected, atol=1e-6)


@torch.no_grad()
def test_another_component_is_edited_beside_hidden_states_of_another_shape(tokens):
    """What is edited has to be a vector for each token; the layer's output need not."""
    expected = adapt(build_model(), component="mlp_output")(tokens(2, 9)).logits
    base = build_model()
    for layer in base.model.layers:
        layer.register_forward_hook(lambda module, args, output: output[None])
    adapter = adapt(base, component="mlp_output")
    for layer in adapter.base_model.model.model.layers:
        layer.register_forward_hook(lambda module, args, output: output[0])
    assert torch.equal(adapter(tokens(2, 9)).logits, expected)


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
def test_vectors_of_heads_are_refused(tokens, positions):
    base = build_model("qwen3", head_dim=32)
    adapter = adapt(base, component="self_attn.q_norm.output", positions=positions)
    with pytest.raises(
        RuntimeError, match=r"self_attn.q_norm.output .*\(2, 9, 4, 32\)"
    ):
        adapter(tokens(2, 9))


# As in transformers: one module that takes all tokens, and does the routing.
ROUTED = "mlp.experts.output"
INSIDE = "mlp.experts.act_fn.output"


@torch.no_grad()
def test_experts_as_a_whole_are_edited_at_the_prompts_tokens(tokens):
    """They get and give the tokens of the batch laid flat, in their order."""
    adapter = adapt(build_model("qwen3_moe"), component=ROUTED)
    ids = tokens(2, 9)
    got, expected = adapter(ids).logits, [adapter(row[None]).logits for row in ids]
    assert torch.allclose(got, torch.cat(expected), atol=1e-5)
    assert not torch.allclose(got, build_model("qwen3_moe")(ids).logits, atol=0.1)


def test_prompts_inside_of_experts_are_refused_when_the_adapter_is_made():
    with pytest.raises(ValueError, match="inside of experts.*; edit mlp_output"):
        adapt(build_model("qwen3_moe"), component=INSIDE)


@torch.no_grad()
def test_every_vector_inside_of_experts_can_be_edited(tokens):
    base = build_model("qwen3_moe", moe_intermediate_size=32)
    adapter = adapt(base, component=INSIDE, positions="all")
    ids = tokens(2, 9)
    got, expected = adapter(ids).logits, [adapter(row[None]).logits for row in ids]
    assert torch.allclose(got, torch.cat(expected), atol=1e-5)
    with pytest.raises(RuntimeError, match="mlp.experts.act_fn.output"):
        adapter(ids, adapter_names=["__base__", "default"])
