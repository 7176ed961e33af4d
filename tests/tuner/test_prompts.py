"""The logits of a sample do not depend on how it reached the model."""

import warnings

import pytest
import torch
from conftest import build_adapter, build_model
from transformers import (
    AutoModelForTokenClassification,
    ContinuousBatchingConfig,
    GenerationConfig,
)

from benchmarks.tasks import Operations

PROMPTS = (9, 4, 7)
ANSWERS = (3, 5, 2)
POSITIONS = ("f2+l3", "f1", "l1", "f7+l7", "all")
TOLERANCE = 1e-5


@pytest.fixture(params=POSITIONS)
def positions(request):
    return request.param


@pytest.fixture
def samples(tokens):
    """Samples of ragged prompts and answers: ids and labels of each, one row each."""
    made = []
    for seed, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = tokens(1, prompt + answer, seed)
        labels = ids.clone()
        labels[:, :prompt] = -100
        made.append((ids, labels))
    return made


def alone(model, samples):
    return [model(ids, labels=labels).logits[0] for ids, labels in samples]


def padded(samples, side, width=14):
    """One batch: ids, labels, mask, and where each sample stands."""
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    places = []
    for row, (sample, label) in enumerate(samples):
        count = sample.shape[1]
        place = slice(0, count) if side == "right" else slice(width - count, width)
        ids[row, place], labels[row, place], mask[row, place] = sample, label, 1
        places.append(place)
    return ids, labels, mask, places


def packed(samples, tail):
    """One row of all samples and a padded tail whose positions begin anew."""
    ids = torch.cat([ids for ids, _ in samples] + [torch.zeros(1, tail).long()], 1)
    labels = torch.cat([y for _, y in samples] + [torch.full((1, tail), -100)], 1)
    positions = torch.cat([torch.arange(x.shape[1]) for x, _ in samples])
    positions = torch.cat([positions, torch.arange(tail)])[None]
    return ids, labels, positions


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(samples, positions, side):
    model = build_adapter(build_model(), positions=positions, tied_weights=False)
    ids, labels, mask, places = padded(samples, side)
    # As generate computes them; training on right padding passes none.
    place_ids = (mask.cumsum(1) - 1).clamp(min=0) if side == "left" else None
    logits = model(
        ids, labels=labels, attention_mask=mask, position_ids=place_ids
    ).logits
    got = [logits[row, place] for row, place in enumerate(places)]
    assert_same(got, alone(model, samples))


@torch.no_grad()
@pytest.mark.parametrize("tail", [0, 4])
def test_packing_changes_nothing(samples, architecture, tail):
    model = build_adapter(build_model(architecture))
    ids, labels, positions = packed(samples, tail)
    logits = model(ids, labels=labels, position_ids=positions, use_cache=False).logits[
        0
    ]
    lengths = [ids.shape[1] for ids, _ in samples]
    got = logits[: sum(lengths)].split(lengths)
    assert_same(got, alone(model, samples))


@torch.no_grad()
def test_packing_under_a_mask_of_segments_finds_the_same_prompts(samples):
    """Collators that keep segment numbers 1…k: the prompts are those of positions."""
    model = build_adapter(build_model())
    ids, labels, positions = packed(samples, tail=3)
    lengths = [ids.shape[1] for ids, _ in samples]
    segments = torch.cat(
        [torch.full((n,), k + 1) for k, n in enumerate(lengths)] + [torch.zeros(3)]
    )[None].long()
    seen = []
    state = model.base_model.model.loreft_hooks.state

    def note(*_):
        seen.append(state.context.indices("default").sides[0].tolist())

    model.base_model.model.model.layers[0].register_forward_hook(note)
    model(ids, labels=labels, position_ids=positions, attention_mask=segments)
    model(ids[:, :-3], labels=labels[:, :-3], position_ids=positions[:, :-3])
    assert seen[0] == seen[1]
    expected, start = [], 0
    for prompt, length in zip(PROMPTS, lengths, strict=True):
        half = prompt // 2
        expected += range(start, start + min(2, half))
        expected += range(start + prompt - min(3, half), start + prompt)
        start += length
    assert seen[0] == expected


@torch.no_grad()
def test_a_training_forward_agrees_with_prefill_and_decode(samples, positions):
    model = build_adapter(build_model(), positions=positions, tied_weights=False)
    for (ids, labels), prompt in zip(samples, PROMPTS, strict=True):
        step = model(ids[:, :prompt], use_cache=True)
        logits = [step.logits[0]]
        for token in ids[0, prompt:]:
            step = model(token[None, None], past_key_values=step.past_key_values)
            logits.append(step.logits[0])
        assert_same([torch.cat(logits)], alone(model, [(ids, labels)]))


@torch.no_grad()
def test_a_decode_step_takes_one_operation_more_than_the_bases(tokens):
    """A copy of its ids, should the conversation go on; none of those before."""
    base = build_model()
    models, seen = (base, build_adapter(build_model())), []
    for model in models:
        cache = model(tokens(1, 10), use_cache=True).past_key_values
        for _ in range(2):
            with Operations() as operations:
                model(tokens(1, 1), past_key_values=cache)
        seen.append(operations.names)
    assert sorted(seen[1]) == sorted([*seen[0], "aten.clone.default"])


def answers(model, ids, **settings):
    return model.generate(
        input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **settings
    )  # fmt: skip


GENERATIONS = {
    "uncached": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("way", list(GENERATIONS))
def test_every_way_to_generate_gives_the_cached_logits(tokens, positions, way):
    model = build_adapter(build_model(), positions=positions, tied_weights=False)
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    expected = answers(model, ids, attention_mask=mask)
    got = answers(model, ids, attention_mask=mask, **GENERATIONS[way])
    assert torch.equal(got.sequences, expected.sequences)
    assert_same(got.logits, expected.logits)


@pytest.mark.parametrize("way", ["cached", *GENERATIONS])
def test_a_left_padded_batch_answers_as_its_rows_alone(samples, positions, way):
    model = build_adapter(build_model(), positions=positions, tied_weights=False)
    prompts = [
        (ids[:, :prompt], labels[:, :prompt])
        for (ids, labels), prompt in zip(samples, PROMPTS, strict=True)
    ]
    ids, _, mask, places = padded(prompts, "left", width=max(PROMPTS))
    settings = GENERATIONS.get(way, {})
    batch = answers(model, ids, attention_mask=mask, **settings)
    for row, (prompt, _) in enumerate(prompts):
        single = answers(model, prompt, attention_mask=torch.ones_like(prompt))
        assert_same(
            [step[row] for step in batch.logits], [step[0] for step in single.logits]
        )


@pytest.fixture
def continuously():
    """Asks for answers as servers do: many prompts, each let in as there is room."""
    config = GenerationConfig(
        max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0
    )

    # Otherwise nearly all of the memory.
    room = ContinuousBatchingConfig(block_size=32, num_blocks=16, max_batch_tokens=64)

    def answer(model, prompts):
        made = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=room,
            progress_bar=False, warmup=False,
        )  # fmt: skip
        return [made[f"req_{number}"].generated_tokens for number in range(len(made))]

    return answer


def one_by_one(model, prompts):
    return [
        answers(model, torch.tensor([prompt])).sequences[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


class Pages:
    """As much of continuous batching's cache as a model asks for, and no ``Cache``."""

    is_compileable = False

    def get_seq_length(self, layer=0):
        return 0

    get_query_offset = get_seq_length

    def get_mask_sizes(self, tokens, layer):
        return tokens, 0

    def update(self, keys, values, *args, **kwargs):
        return keys, values


def test_continuous_batching_is_refused_where_prompts_count(tokens, continuously):
    model = build_adapter(build_model())
    prompts = [tokens(1, 9)[0].tolist(), tokens(1, 4, seed=1)[0].tolist()]
    with pytest.raises(ValueError, match=r"generate_batch, transformers serve.*; call"):
        continuously(model, prompts)
    # A server's forward, should the adapter come after the server.
    ids, server = tokens(1, 9), {"cache": Pages(), "use_cache": False}
    with pytest.raises(ValueError, match="continuous batching"):
        model(ids, **server)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(ids, **server).logits, build_model()(ids).logits)
        got = continuously(model, prompts)
    assert got == one_by_one(build_model(), prompts)


def test_continuous_batching_edits_every_token(tokens, continuously):
    model = build_adapter(build_model(), positions="all")
    prompts = [tokens(1, 9)[0].tolist(), tokens(1, 4, seed=1)[0].tolist()]
    assert continuously(model, prompts) == one_by_one(model, prompts)


def test_a_beam_of_one_prompt_sees_it_in_every_row(tokens):
    model = build_adapter(build_model())
    ids = tokens(2, 8)
    settings = {"num_beams": 3, "attention_mask": torch.ones_like(ids)}
    cached = answers(model, ids, **settings)
    uncached = answers(model, ids, use_cache=False, **settings)
    assert torch.equal(cached.sequences, uncached.sequences)


def test_embeddings_in_place_of_ids_generate_the_same(tokens):
    model = build_adapter(build_model())
    ids = tokens(2, 8)
    expected = answers(model, ids, use_cache=False)
    embeds = model.get_input_embeddings()(ids)
    got = model.generate(
        inputs_embeds=embeds, max_new_tokens=6, do_sample=False, pad_token_id=0,
        use_cache=False,
    )  # fmt: skip
    assert torch.equal(got, expected.sequences[:, 8:])


@torch.no_grad()
@pytest.mark.parametrize("turns", ["every", "first"])
def test_a_conversation_goes_on_as_it_was_trained(tokens, turns):
    """Without a chat template: what `generate` answered is known to be no prompt."""
    model = build_adapter(build_model(), turns=turns, positions="f1+l2")
    ids = tokens(1, 14)
    labels = ids.clone()
    labels[:, :5] = -100  # one user turn
    labels[:, 7:11] = -100  # a later one
    trained = model(ids, labels=labels).logits[0]
    settings = {"do_sample": False, "return_dict_in_generate": True}
    # Answered with ids[5:7], of which the last is not in the cache.
    force = [lambda seen, scores: one_hot(ids[:, seen.shape[1]], scores)]
    first = model.generate(
        input_ids=ids[:, :5], max_new_tokens=2, logits_processor=force, **settings
    )
    cache = first.past_key_values
    assert cache.get_seq_length() == 6 and torch.equal(first.sequences, ids[:, :7])
    second = model.generate(
        input_ids=ids[:, :11], past_key_values=cache, max_new_tokens=1,
        output_logits=True, **settings
    )  # fmt: skip
    assert_same([second.logits[0][0]], [trained[10]])


def one_hot(column, scores):
    return torch.full_like(scores, -1e9).scatter(1, column[:, None], 0.0)


@pytest.mark.usefixtures("one_thread")
def test_reserved_slots_compute_what_counted_ones_do(samples, monkeypatch):
    """Off the CPU indices are not counted but reserved: same logits, same gradients."""
    results = []
    for reserve in (False, True):
        model = build_adapter(build_model(), tied_weights=False)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda on=reserve: on)
        ids, labels, positions = packed(samples, tail=4)
        output = model(ids, labels=labels, position_ids=positions, use_cache=False)
        output.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append((output.logits, gradients))
    (logits, gradients), (other_logits, other_gradients) = results
    assert torch.equal(logits, other_logits)
    assert_same(gradients, other_gradients)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_answers_that_a_trainer_tells_are_those_of_labels(samples, positions, side):
    model = build_adapter(build_model(), positions=positions, tied_weights=False)
    ids, labels, mask, _ = padded(samples, side)
    expected = model(ids, labels=labels, attention_mask=mask).logits
    state = model.base_model.model.loreft_hooks.state
    state.find_answers = lambda asked: {id(ids): labels != -100}[id(asked)]
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    # A fused loss calls the backbone past the model.
    hidden = model.base_model.model.model(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(model.base_model.model.lm_head(hidden), expected)


@torch.no_grad()
def test_answers_can_be_told_by_columns(tokens):
    model = build_adapter(build_model())
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[:, :6] = -100
    expected = model(ids, labels=labels).logits
    state = model.base_model.model.loreft_hooks.state
    state.find_answers = lambda asked: torch.arange(asked.shape[1])[None] >= 6
    assert torch.equal(model(ids).logits, expected)


def test_answers_are_asked_for_only_where_something_is_edited(tokens):
    model = build_adapter(build_model())
    ids = tokens(1, 6)

    def unknown(ids):
        raise ValueError("these ids are not known")

    model.base_model.model.loreft_hooks.state.find_answers = unknown
    with pytest.raises(ValueError, match="not known"):
        model(ids)
    with model.disable_adapter():
        model(ids)
    model(ids, labels=ids.where(torch.arange(6) > 3, -100))
    model.generate(input_ids=ids, max_new_tokens=2, pad_token_id=0)


def test_training_without_labels_warns(tokens):
    model = build_adapter(build_model())
    with pytest.warns(UserWarning, match="takes the whole input as the prompt"):
        model.train()(tokens(1, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.eval()(tokens(1, 6))


def test_a_batch_without_any_prompt_warns(tokens):
    model = build_adapter(build_model())
    ids = tokens(1, 6)
    with pytest.warns(UserWarning, match="no prompt and nothing is edited"):
        model(ids, labels=ids)


@torch.no_grad()
def test_a_classifiers_labels_are_no_answers(tokens):
    """They have the shape of a language model's, and mean something else."""
    config = build_model().config
    config.num_labels = 5
    base = AutoModelForTokenClassification.from_config(config).eval()
    model = build_adapter(base, task_type="TOKEN_CLS")
    ids = tokens(1, 8)
    labels = torch.zeros_like(ids)
    assert torch.equal(model(ids, labels=labels).logits, model(ids).logits)


def test_a_mask_without_rows_and_columns_is_refused(tokens):
    model = build_adapter(build_model())
    ids = tokens(1, 6)
    with pytest.raises(
        ValueError, match=r"2-D attention mask \(1, 6\).*\(1, 1, 6, 6\)"
    ):
        model(ids, attention_mask=torch.zeros(1, 1, 6, 6))


def test_a_layer_called_by_itself_says_why_it_cannot(tokens):
    model = build_adapter(build_model())
    model(tokens(1, 4))
    layer = model.base_model.model.model.layers[0]
    hidden = torch.zeros(1, 4, 32)
    rotary = model.base_model.model.model.rotary_emb(hidden, torch.arange(4)[None])
    with pytest.raises(RuntimeError, match="called outside a forward of its model"):
        layer(hidden, position_embeddings=rotary, attention_mask=None)
