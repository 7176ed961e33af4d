"""Heads that call past the backbone, and models within a model."""

import copy

import pytest
import torch
from conftest import HIDDEN, build_adapter, build_model
from plain_reference import edited_by_hand, edited_tokens
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    BartConfig,
    BartForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    MarianConfig,
    MarianForCausalLM,
    MBartConfig,
    MBartForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PegasusConfig,
    PegasusForCausalLM,
    TrOCRConfig,
    TrOCRForCausalLM,
    WhisperConfig,
    WhisperForCausalLM,
)

OPT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "ffn_dim": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# More layers in the encoder that is left out than in the decoder.
DECODER = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 5,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 1,
}
POSITIONS = {"max_position_embeddings": 64}
ARCHITECTURES = {
    "opt": (OPTConfig, OPTForCausalLM, OPT),
    "bart": (BartConfig, BartForCausalLM, DECODER | POSITIONS),
    "mbart": (MBartConfig, MBartForCausalLM, DECODER | POSITIONS),
    "pegasus": (PegasusConfig, PegasusForCausalLM, DECODER | POSITIONS),
    "marian": (MarianConfig, MarianForCausalLM, DECODER | POSITIONS),
    "trocr": (TrOCRConfig, TrOCRForCausalLM, DECODER | POSITIONS),
    "whisper": (
        WhisperConfig,
        WhisperForCausalLM,
        DECODER | {"max_target_positions": 64, "suppress_tokens": None},
    ),
}
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}


def build(architecture):
    config, model, settings = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    base = model(config(**settings)).eval()
    base.generation_config.eos_token_id = None
    base.generation_config.forced_eos_token_id = None
    return base


def adapt(base, **settings):
    return build_adapter(copy.deepcopy(base), **{"tied_weights": False} | settings)


@pytest.fixture(params=list(ARCHITECTURES))
def pair(request):
    base = build(request.param)
    return base, adapt(base)


@torch.no_grad()
def test_a_forward_is_edited_at_its_prompt(tokens, pair):
    base, adapter = pair
    ids = tokens(2, 9)
    got = adapter(input_ids=ids, output_hidden_states=True)
    with edited_by_hand(base, adapter, edited_tokens(9)) as hand:
        expected = hand(input_ids=ids, output_hidden_states=True)
    assert torch.allclose(got.logits, expected.logits, atol=1e-5)
    assert not torch.allclose(got.logits, base(input_ids=ids).logits, atol=0.1)
    assert len(got.hidden_states) == 3
    for h, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert torch.allclose(h, other, atol=1e-5)


@torch.no_grad()
def test_labels_tell_the_prompt(tokens, pair):
    base, adapter = pair
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[:, :6] = -100
    got = adapter(input_ids=ids, labels=labels).logits
    with edited_by_hand(base, adapter, edited_tokens(6)) as hand:
        assert torch.allclose(got, hand(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_generation_from_left_padded_prompts(tokens, pair, use_cache):
    base, adapter = pair
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[1, :3] = mask[1, :3] = 0
    got = adapter.generate(
        input_ids=ids, attention_mask=mask, use_cache=use_cache, **GREEDY, **LOGITS
    )
    mask = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)
    shifted = [[token + 3 for token in side] for side in edited_tokens(6)]
    for row, edited in enumerate([edited_tokens(9), shifted]):
        with edited_by_hand(base, adapter, edited) as hand:
            expected = hand(input_ids=got.sequences, attention_mask=mask).logits
        for step, logits in enumerate(got.logits):
            assert torch.allclose(logits[row], expected[row, 8 + step], atol=1e-5)


@pytest.mark.parametrize("architecture", ["bart", "trocr", "mbart"])
@torch.no_grad()
def test_what_is_attended_to_across_is_handed_on(tokens, architecture):
    base = build(architecture)
    adapter, ids, encoded = adapt(base), tokens(2, 9), torch.randn(2, 5, 32)
    got = adapter(input_ids=ids, encoder_hidden_states=encoded).logits
    with edited_by_hand(base, adapter, edited_tokens(9)) as hand:
        expected = hand(input_ids=ids, encoder_hidden_states=encoded).logits
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(got, adapter(input_ids=ids).logits, atol=0.1)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("component", ["block_output", "fc1.output"])
@pytest.mark.parametrize("architecture", ["opt", "bart"])
def test_checkpointing_changes_no_gradient(
    tokens, architecture, component, use_reentrant
):
    model = adapt(build(architecture), component=component).train()
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[:, :6] = -100

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for one, other in zip(gradients(), expected, strict=True):
        # On an AMD EPYC the last bits differ under reentrant checkpointing.
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    assert any(gradient.any() for gradient in expected)


@pytest.mark.parametrize("failing", ["head", "base model", "decoder"])
@torch.no_grad()
def test_a_forward_after_one_that_failed_is_right(tokens, failing):
    """The failed forward's context is still there, of whichever model began it."""
    adapter, ids = adapt(build("opt")), tokens(2, 9)
    base_model = adapter.base_model.model.model
    calls = {"head": adapter, "base model": base_model, "decoder": base_model.decoder}
    succeeding = {"head": adapter, failing: calls[failing]}.values()
    expected = [call(input_ids=ids)[0] for call in succeeding]

    def fail(module, args):
        raise InterruptedError

    for call, result in zip(succeeding, expected, strict=True):
        handle = base_model.decoder.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(InterruptedError):
            calls[failing](input_ids=tokens(2, 6))
        handle.remove()
        assert torch.equal(call(input_ids=ids)[0], result)


@torch.no_grad()
def test_packed_samples_are_edited_as_alone(tokens):
    adapter = adapt(build("opt"))
    ids = tokens(1, 9)
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    layer = adapter.base_model.model.model.decoder.layers[0]
    found = []
    layer.register_forward_hook(
        lambda *_: found.append(layer.state.context.indices("default").all_N)
    )
    with pytest.warns(UserWarning, match="packed samples are not kept apart"):
        adapter(input_ids=ids, position_ids=places)
    (packed,) = found
    first, second = ([sorted(t) for t in edited_tokens(n)] for n in (5, 4))
    both = [*first[0], *(t + 5 for t in second[0])]
    both += [*first[1], *(t + 5 for t in second[1])]
    assert packed.tolist() == both


@pytest.mark.parametrize("rows", [1, 3])
def test_the_head_gets_a_copy_of_the_last_hidden_states(tokens, rows):
    """Torch calls the slice of one row contiguous, and multiplies it as slowly."""
    adapter = build_adapter(build_model())
    head, seen = adapter.get_base_model().lm_head, []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    adapter.generate(tokens(rows, 9), **GREEDY)
    assert [h.stride() for h in seen] == [(HIDDEN, HIDDEN, 1)] * 4
    handle.remove()
    adapter.unload()
    assert not head._forward_pre_hooks


def test_it_compiles_to_one_graph(tokens):
    torch._dynamo.reset()
    model = adapt(build("opt"))
    # Not in training mode, in which OPT itself breaks the graph (layerdrop).
    for module in model.modules():
        if type(module).__name__ == "LoreftIntervention":
            module.train()
    batches = [tokens(2, 9, seed) for seed in (0, 1)]
    batches = [
        {"input_ids": ids, "labels": ids.where(torch.arange(9) > 6, -100)}
        for ids in batches
    ]
    expected = [model(**batch, use_cache=False)[1] for batch in batches]
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    for batch, logits in zip(batches, expected, strict=True):
        got = model(**batch, use_cache=False)[1]
        assert torch.allclose(got, logits, atol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_generate_of_a_model_within(tokens):
    """As BLIP-2's does with the embeddings of the image and the prompt."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["intermediate_size"] = 48
    config = Blip2Config(
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        qformer_config=sizes | {"vocab_size": 64, "encoder_hidden_size": 32},
        text_config=OPT | {"model_type": "opt"},
        num_query_tokens=3,
        image_token_index=5,
    )
    torch.manual_seed(0)
    base = Blip2ForConditionalGeneration(config).eval()
    base.generation_config.eos_token_id = None
    adapter, ids = adapt(base), tokens(2, 9)
    ids[:, :3] = 5
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    got = adapter.generate(input_ids=ids, **pixels, **GREEDY, **LOGITS)
    with edited_by_hand(base, adapter, edited_tokens(9)) as hand:
        expected = hand(input_ids=got.sequences, **pixels).logits[:, 8:-1]
    assert torch.allclose(torch.stack(got.logits, 1), expected, atol=1e-5)
    within = adapter.unload().language_model
    assert "generate" not in within.__dict__
