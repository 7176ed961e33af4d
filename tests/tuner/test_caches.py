"""The logits of a prompt are those without a cache, whichever cache it goes on with."""

import copy
import io
from functools import partial

import pytest
import torch
from conftest import build_adapter, build_model
from plain_reference import edited_tokens
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    RwkvConfig,
    StaticCache,
    XLNetConfig,
)

from axolotl_reft.tuner.layer import interventions_of

TOLERANCE = 1e-5
PREFIX, PROMPT, TOTAL = 9, 14, 18  # columns of a shared prefix, a prompt, a sample
POSITIONS = ("f2+l3", "l2", "all")


@pytest.fixture(params=POSITIONS)
def positions(request):
    return request.param


@pytest.fixture
def ids(tokens):
    return tokens(1, TOTAL)


def answer(model, ids, **settings):
    """The logits of the next tokens, one row a step."""
    output = model.generate(
        input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **settings
    )  # fmt: skip
    return torch.stack(output.logits)


def assert_same(got, expected, tolerance=TOLERANCE):
    assert (got - expected).abs().max() < tolerance


def filled(model, ids, **settings):
    with torch.no_grad():
        return model(ids, use_cache=True, **settings).past_key_values


def filled_by_generate(model, ids):
    return model.generate(
        input_ids=ids, max_new_tokens=1, pad_token_id=0, return_dict_in_generate=True
    ).past_key_values


def filled_by_the_base_alone(model, ids):
    with model.disable_adapter():
        return filled(model, ids)


def filled_by_another_model(model, ids):
    return filled(build_model(), ids)


def saved_and_loaded(model, ids):
    held = io.BytesIO()
    torch.save(filled(model, ids), held)
    held.seek(0)
    return torch.load(held, weights_only=False)


def cropped(model, ids):
    cache = filled(model, torch.cat([ids, ids], 1))
    cache.crop(-ids.shape[1])
    return cache


def of_tensors(model, ids):
    """Made from another cache's keys and values."""
    made = DynamicCache()
    for number, layer in enumerate(filled(model, ids).layers):
        made.update(layer.keys, layer.values, number)
    return made


def of_embeddings(model, ids):
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        return model(inputs_embeds=embeds, use_cache=True).past_key_values


def of_other_tokens(model, ids):
    return filled(model, ids.roll(1, 1))


def with_a_packed_row(model, ids):
    half = torch.arange(ids.shape[1]) % 5
    return filled(model, ids, position_ids=half[None])


def under_another_adapter(model, ids):
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter("other")
    cache = filled(model, ids)
    model.base_model.set_adapter("default")
    return cache


def the_cache(model, ids):
    return filled(model, ids)


def a_copy(model, ids):
    return copy.deepcopy(filled(model, ids))


def a_copy_of_generates(model, ids):
    return copy.deepcopy(filled_by_generate(model, ids))


WAYS = [
    the_cache, a_copy, filled_by_generate, a_copy_of_generates, saved_and_loaded,
    cropped, filled_by_the_base_alone, filled_by_another_model, of_tensors,
    of_embeddings, of_other_tokens, with_a_packed_row, under_another_adapter,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_shared_prefix_however_it_was_cached(ids, positions, way):
    model = build_adapter(build_model(), positions=positions, tied_weights=False)
    prompt = ids[:, :PROMPT]
    expected = answer(model, prompt)
    got = answer(model, prompt, past_key_values=way(model, prompt[:, :PREFIX]))
    assert_same(got, expected)


def test_a_prefix_repeated_for_a_batch(tokens, positions):
    model = build_adapter(build_model(), positions=positions, tied_weights=False)
    prefix, questions = tokens(1, PREFIX), tokens(3, 5, seed=1)
    prompts = torch.cat([prefix.expand(3, -1), questions], 1)
    cache = filled(model, prefix)
    cache.batch_repeat_interleave(3)
    expected = answer(model, prompts)
    assert_same(answer(model, prompts, past_key_values=cache), expected)


@torch.no_grad()
def test_a_repeated_cache_is_known_to_be_filled_by_the_adapter(tokens, positions):
    model = build_adapter(build_model(), positions=positions, tied_weights=False)
    prompt, words = tokens(1, PROMPT), tokens(3, 1, seed=1)
    expected = [
        model(word[None], past_key_values=filled(model, prompt)).logits
        for word in words
    ]
    cache = filled(model, prompt)
    cache.batch_repeat_interleave(3)
    assert_same(model(words, past_key_values=cache).logits, torch.cat(expected))


def test_rows_of_a_cache_in_another_order(tokens, positions):
    model = build_adapter(build_model(), positions=positions, tied_weights=False)
    prompts = tokens(2, PROMPT)
    cache = filled(model, prompts[:, :PREFIX])
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = prompts.flip(0)
    assert_same(answer(model, swapped, past_key_values=cache), answer(model, swapped))


def test_only_the_columns_that_differ_are_computed_again(ids):
    """Of l3 a prefix keeps all but its last three tokens."""
    model = build_adapter(build_model(), positions="l3")
    seen = []
    layer = model.base_model.model.model.layers[0]
    layer.register_forward_hook(lambda _, args, output: seen.append(output.shape[1]))
    cache = filled(model, ids[:, :PREFIX])
    answer(model, ids[:, :PROMPT], past_key_values=cache)
    assert seen[:2] == [PREFIX, PROMPT - PREFIX + 3]


def with_adapters(count, **settings):
    """A model with so many adapters, each of its own numbers."""
    model = build_adapter(build_model(), **settings)
    names = ["default", *(f"adapter{number}" for number in range(1, count))]
    for number, name in enumerate(names[1:]):
        torch.manual_seed(number)
        model.add_adapter(name, model.peft_config["default"])
        for path, parameter in model.named_parameters():
            if f".{name}" in path:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.eval(), names


def tokens_of_forwards(model):
    seen = []
    layer = model.base_model.model.model.layers[0]
    layer.register_forward_hook(lambda _, args, output: seen.append(output.shape[1]))
    return seen


@pytest.mark.parametrize(
    ("positions", "again"), [("l3", 3), ("l7", 7), ("f2+l3", PROMPT), ("all", PROMPT)]
)
def test_adapters_answer_one_prompt_on_one_cache(ids, positions, again):
    """Of a prompt that another adapter has edited, the tokens from the first edited one
    on are computed again; of the same adapter's its last."""
    model, names = with_adapters(4, positions=positions, tied_weights=False)
    prompt, expected = ids[:, :PROMPT], {}
    for name in names:
        model.set_adapter(name)
        expected[name] = answer(model, prompt)
    with model.disable_adapter():
        expected[None] = answer(model, prompt)
    assert all((expected[a] - expected[None]).abs().max() > 0.01 for a in names)
    cache, seen = DynamicCache(), tokens_of_forwards(model)
    for name in names:
        model.set_adapter(name)
        got = answer(model, prompt, past_key_values=cache)
        assert_same(got, expected[name])
    with model.disable_adapter():
        assert_same(answer(model, prompt, past_key_values=cache), expected[None])
    assert seen == [PROMPT, 1, 1, 1] + 4 * [again, 1, 1, 1]


@pytest.mark.parametrize("fill", [filled, filled_by_generate])
def test_a_prompt_that_is_all_in_the_cache_is_answered_again(ids, positions, fill):
    model = build_adapter(build_model(), positions=positions, tied_weights=False)
    prompt = ids[:, :PROMPT]
    expected, cache = answer(model, prompt), fill(model, prompt)
    seen = tokens_of_forwards(model)
    for _ in range(2):
        assert_same(answer(model, prompt, past_key_values=cache), expected)
    assert seen == 8 * [1]


def test_a_static_cache_is_computed_again(ids):
    model = build_adapter(build_model())
    cache = StaticCache(model.config, max_cache_len=32)
    filled(model, ids[:, :PREFIX], past_key_values=cache)
    expected = answer(model, ids[:, :PROMPT])
    got = answer(model, ids[:, :PROMPT], past_key_values=cache)
    assert_same(got, expected)


def test_a_sliding_window_that_is_full_is_refused(ids):
    model = build_adapter(build_model("mistral", sliding_window=4))
    prompt = ids[:, :PROMPT]
    cache = filled(model, prompt[:, :PREFIX])
    before = [layer.keys for layer in cache.layers]
    with pytest.raises(ValueError, match="a DynamicSlidingWindowLayer cannot be cut"):
        model.generate(input_ids=prompt, past_key_values=cache)
    assert all(
        layer.keys is keys for layer, keys in zip(cache.layers, before, strict=True)
    )


def test_new_tokens_alone_on_a_cache_that_would_be_cut_are_refused(ids):
    model = build_adapter(build_model())
    prompt = ids[:, :PROMPT]
    cache = filled(model, prompt[:, :PREFIX])
    with pytest.raises(ValueError, match=r"the first 9 tokens were not passed again;"):
        model.generate(
            input_ids=prompt[:, PREFIX:],
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
        )


def test_what_an_error_leaves_in_a_cache_is_not_trusted(ids):
    """Of f7 a prompt of 9 tokens has 4 edited, and one of 14 all 7."""
    model = build_adapter(build_model(), positions="f7")
    cache = filled(model, ids[:, :PREFIX])

    def stop(module, args, output):
        raise KeyboardInterrupt

    handle = model.base_model.model.model.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        answer(model, ids[:, :PROMPT], past_key_values=cache, prefill_chunk_size=2)
    handle.remove()
    assert cache.get_seq_length() == 6  # of which 4 were kept
    got = answer(model, ids[:, :PREFIX], past_key_values=cache)
    assert_same(got, answer(model, ids[:, :PREFIX]))


# --- forwards outside of generate ---


@pytest.fixture
def labels(ids):
    return ids.where(torch.arange(TOTAL) >= PROMPT, -100)


@torch.no_grad()
@pytest.mark.parametrize("start", [PROMPT, PROMPT + 1])
@pytest.mark.parametrize("with_mask", [False, True])
def test_labelled_answers_on_a_cached_prompt(ids, labels, positions, start, with_mask):
    model = build_adapter(build_model(), positions=positions, tied_weights=False)
    expected = model(ids, labels=labels).logits[:, start:]
    cache = filled(model, ids[:, :start], labels=labels[:, :start])
    mask = torch.ones_like(ids) if with_mask else None
    for _ in range(2):  # other answers to the same prompt
        got = model(
            ids[:, start:], labels=labels[:, start:], attention_mask=mask,
            past_key_values=copy.deepcopy(cache),
        )  # fmt: skip
        assert_same(got.logits, expected)


MARK, END = (61, 62), 63
MARKED = {"generation_prompts": [[*MARK]], "end_of_turn": [END]}


@torch.no_grad()
def test_labels_tell_more_answers_than_marks_do(tokens, positions):
    """Behind the end of a marked answer, where a prompt would be without labels."""
    model = build_adapter(
        build_model(), positions=positions, tied_weights=False, turn_markers=MARKED
    )
    mark, end = torch.tensor([MARK]), torch.tensor([[END]])
    prompt, answer = torch.cat([tokens(1, 8), mark], 1), tokens(1, 8, seed=1)
    answer = torch.cat([answer[:, :3], end, answer[:, 3:]], 1).clamp(max=63)
    ids = torch.cat([prompt, answer], 1)
    labels = ids.where(torch.arange(ids.shape[1]) >= 10, -100)
    expected = model(ids, labels=labels).logits[:, 10:]
    cache = filled(model, prompt)
    got = model(answer, labels=answer, past_key_values=cache).logits
    assert_same(got, expected)
    # What comes next is compared with what was read, not with what marks tell.
    word, whole = tokens(1, 1, seed=2), torch.cat([ids, tokens(1, 1, seed=2)], 1)
    labels = whole.where(torch.arange(whole.shape[1]) >= 10, -100)
    step = model(word, labels=word, past_key_values=cache).logits
    assert_same(step, model(whole, labels=labels).logits[:, -1:])


@torch.no_grad()
def test_labels_that_contradict_marks_are_refused_on_a_cache(tokens):
    model = build_adapter(build_model(), positions="f2", turn_markers=MARKED)
    mark, end = torch.tensor([MARK]), torch.tensor([[END]])
    prompt = torch.cat([tokens(1, 6), mark, tokens(1, 2), end, tokens(1, 5)], 1)
    answer = torch.cat([tokens(1, 2), mark, tokens(1, 2)], 1)
    cache = filled(model, prompt)
    with pytest.raises(ValueError, match="turn_markers: the labels train tokens"):
        model(answer, labels=answer, past_key_values=cache)


@torch.no_grad()
def test_answers_on_a_cached_prompt_are_not_said_to_have_no_prompt(ids, recwarn):
    model = build_adapter(build_model())
    cache = filled(model, ids[:, :PROMPT])
    answer = ids[:, PROMPT:]
    model(answer, labels=answer, past_key_values=cache)
    assert not [w for w in recwarn if "it has no prompt" in str(w.message)]


@torch.no_grad()
@pytest.mark.parametrize("positions", ["f2", "f2+l3", "l3"])
def test_labels_on_a_cache_that_ends_within_the_prompt(ids, labels, positions):
    """Right where the columns stay as they are, and otherwise refused."""
    model = build_adapter(build_model(), positions=positions)
    cache = filled(model, ids[:, :PREFIX])
    settings = {"labels": labels[:, PREFIX:], "past_key_values": cache}
    if positions == "f2":
        expected = model(ids, labels=labels).logits[:, PREFIX:]
        assert_same(model(ids[:, PREFIX:], **settings).logits, expected)
        return
    with pytest.raises(ValueError, match="columns from 6 on were edited for another"):
        model(ids[:, PREFIX:], **settings)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["f2", "f2+l3", "l3", "all"])
def test_several_tokens_that_may_be_prompt_or_answer(ids, positions):
    model = build_adapter(build_model(), positions=positions)
    cache = filled(model, ids[:, :PREFIX])
    if "l" not in positions or positions == "all":
        expected = model(ids).logits[:, PREFIX:]
        got = model(ids[:, PREFIX:], past_key_values=cache).logits
        assert_same(got, expected)
        return
    with pytest.raises(ValueError, match="9 tokens on a filled cache, and nothing"):
        model(ids[:, PREFIX:], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("back", [1, 2, 5])
def test_the_end_of_a_prompt_is_computed_again(ids, positions, back):
    """As loops do that want the logits of a cached prompt."""
    model = build_adapter(build_model(), positions=positions, tied_weights=False)
    prompt = ids[:, :PROMPT]
    expected = model(prompt).logits[:, -back:]
    cache = filled(model, prompt)
    cache.crop(-back)
    got = model(prompt[:, -back:], past_key_values=cache)
    assert_same(got.logits, expected)
    step = model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache).logits
    once = filled(model, prompt)
    assert_same(step, model(ids[:, PROMPT : PROMPT + 1], past_key_values=once).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "way", [filled_by_the_base_alone, filled_by_another_model, under_another_adapter]
)
def test_a_step_on_a_cache_that_was_edited_otherwise_is_refused(ids, positions, way):
    model = build_adapter(build_model(), positions=positions)
    cache = way(model, ids[:, :PROMPT])
    with pytest.raises(ValueError, match="past_key_values: .*; pass a fresh cache"):
        model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache)
    with model.disable_adapter():  # the base goes on with what it likes
        model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache)


@torch.no_grad()
def test_a_loop_whose_prefill_was_compiled_goes_on(ids):
    model = build_adapter(build_model())
    cache = StaticCache(model.config, max_cache_len=32)
    compiled = torch.compile(model, backend="eager")
    compiled(ids[:, :PROMPT], past_key_values=cache)
    got = model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache).logits
    loop = filled(model, ids[:, :PROMPT])
    assert_same(got, model(ids[:, PROMPT : PROMPT + 1], past_key_values=loop).logits)


@pytest.mark.parametrize("generates", [False, True])
def test_a_model_is_saved_whole_after_it_saw_a_cache(ids, generates):
    # Llama's own forward cannot be pickled where the package kernels is installed.
    model, held = build_adapter(build_model("gpt2")), io.BytesIO()
    cache = (filled_by_generate if generates else filled)(model, ids)
    torch.save(model, held)
    held.seek(0)
    loaded = torch.load(held, weights_only=False)
    assert_same(answer(loaded, ids), answer(model, ids))
    assert copy.deepcopy(model) is not None and cache.get_seq_length() == TOTAL


# --- other text while generate is under way ---


@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_by_another_prompt_stands_for_itself(tokens, use_cache):
    model = build_adapter(build_model())
    prompt, negative, scale = tokens(1, 12), tokens(1, 7, seed=1), 1.5
    got = model.generate(
        input_ids=prompt, max_new_tokens=3, do_sample=False, pad_token_id=0,
        guidance_scale=scale, negative_prompt_ids=negative, use_cache=use_cache,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    said = got.sequences[:, 12:]
    with torch.no_grad():
        ours, other = filled(model, prompt), filled(model, negative)
        logits = model(prompt).logits[:, -1], model(negative).logits[:, -1]
        for number, scores in enumerate(got.scores):
            by, against = (x.log_softmax(-1) for x in logits)
            assert_same(scores, scale * (by - against) + against)
            word = said[:, number, None]
            whole = torch.cat([negative, said[:, : number + 1]], 1)
            logits = [
                model(word, past_key_values=ours).logits[:, -1],
                model(word, past_key_values=other).logits[:, -1]
                if use_cache else model(whole).logits[:, -1],
            ]  # fmt: skip


# --- caches of other kinds ---


RECURRENT_TOLERANCE = 1e-3  # the bases' own is 1e-4; an edit elsewhere moves by 0.1
RECURRENT = {
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
}  # fmt: skip


@pytest.fixture(params=list(RECURRENT))
def recurrent(request, positions):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param, vocab_size=64, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, pad_token_id=0, **RECURRENT[request.param],
    )  # fmt: skip
    config.initializer_range = 0.2
    base = AutoModelForCausalLM.from_config(config).eval()
    return build_adapter(base, positions=positions, tied_weights=False)


def state_of(output):
    names = ("past_key_values", "cache_params", "state")
    return {name: output[name] for name in names if output.get(name) is not None}


@torch.no_grad()
def test_a_recurrent_state_goes_on_token_by_token(recurrent, ids):
    prompt = ids[:, :PROMPT]
    expected = answer(recurrent, prompt, use_cache=False)
    assert_same(answer(recurrent, prompt), expected, RECURRENT_TOLERANCE)
    said = recurrent.generate(
        input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0
    )[:, PROMPT:]
    output, got = recurrent(prompt, use_cache=True), []
    for column in range(4):
        got.append(output.logits[:, -1])
        word = said[:, column, None]
        output = recurrent(word, use_cache=True, **state_of(output))
    assert_same(torch.stack(got), expected, RECURRENT_TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["f2+l3"])
def test_several_tokens_on_a_recurrent_state_are_refused(recurrent, ids):
    state = state_of(recurrent(ids[:, :PREFIX], use_cache=True))
    with pytest.raises(ValueError, match="past_key_values: "):
        recurrent(ids[:, PREFIX:], use_cache=True, **state)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["f2+l3"])
def test_a_prompt_on_a_recurrent_state_is_computed_anew_or_refused(recurrent, ids):
    prompt = ids[:, :PROMPT]
    state = state_of(recurrent(prompt[:, :PREFIX], use_cache=True))
    if "state" in state:  # RWKV's list cannot be emptied
        with pytest.raises(ValueError, match="a list cannot be cut back; pass a fresh"):
            recurrent.generate(input_ids=prompt, **state)
        return
    got, expected = answer(recurrent, prompt, **state), answer(recurrent, prompt)
    assert_same(got, expected, RECURRENT_TOLERANCE)


def test_tokens_that_xlnet_passes_again_are_edited_again(tokens):
    """Each step has the two tokens before it once more, and a query behind them."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    config = XLNetConfig(vocab_size=64, pad_token_id=0, **sizes)
    base = AutoModelForCausalLM.from_config(config).eval()
    model = build_adapter(base, tied_weights=False)
    prompt, steps = tokens(1, 9), []
    got = answer(model, prompt)
    sides = {}
    for found in interventions_of(model, "default"):
        sides.setdefault(found.layer, []).append(found.intervention)

    def edit(layer, module, args, output):
        columns = range(10) if len(output[0]) == 10 else range(6 + len(steps), 99)
        h_TBD = output[0].clone()
        for place in range(len(h_TBD)):
            for intervention, side in zip(sides[layer], edited_tokens(9), strict=True):
                if columns[place] in side:
                    h_TBD[place] = intervention(h_TBD[place])
        return (h_TBD, *output[1:])

    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.load_state_dict(model.unload().state_dict())
    plain.register_forward_pre_hook(lambda *_: steps.append(None))
    for number, layer in enumerate(plain.transformer.layer):
        layer.register_forward_hook(partial(edit, number))
    with torch.no_grad():
        assert_same(got, answer(plain, prompt))


@torch.no_grad()
def test_a_mask_that_the_backbone_is_not_given(tokens, positions):
    """RWKV's head takes one, and its backbone is called without."""
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, context_length=64
    )
    base = AutoModelForCausalLM.from_config(config).eval()
    model = build_adapter(base, positions=positions, tied_weights=False)
    ids, mask = tokens(1, 9), torch.ones(1, 12, dtype=torch.long)
    mask[:, 9:] = 0
    padded = torch.cat([ids, torch.zeros(1, 3).long()], 1)
    got = model(padded, attention_mask=mask).logits[:, :9]
    assert_same(got, model(ids).logits)
