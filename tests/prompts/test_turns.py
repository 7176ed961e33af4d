"""Conversations of several turns: training and inference edit the same tokens."""

import copy

import pytest
import torch
from axolotl.cli.chat import CausalTurnGenerator
from axolotl.prompt_strategies.chat_template import (
    ChatTemplatePrompter,
    ChatTemplateStrategy,
)
from axolotl.utils.chat_templates import get_chat_template
from chat import CONVERSATIONS, EOS, build_chat_tokenizer
from chat_templates import build_tokenizer_for, template_files
from conftest import build_adapter, build_model
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from axolotl_reft import turn_markers
from axolotl_reft.prompts.turns import Turns

TOLERANCE = 2e-5
ROLES = ("user", "assistant")


@pytest.fixture(params=list(EOS))
def template(request):
    return request.param


@pytest.fixture
def tokenizer(template):
    return build_chat_tokenizer(template)


@pytest.fixture(params=["every", "first"])
def turns(request):
    return request.param


def adapted(tokenizer, turns="every", **settings):
    base = build_model(vocab_size=len(tokenizer), max_position_embeddings=2048)
    defaults = {"positions": "f2+l3", "tied_weights": False}
    return build_adapter(
        base, turns=turns, turn_markers=turn_markers(tokenizer), **defaults | settings
    )


def messages(texts):
    return [
        {"role": ROLES[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]


def tokenized(tokenizer, texts, **options):
    """Ids and labels as axolotl makes them for `type: chat_template`."""
    prompter = ChatTemplatePrompter(tokenizer, tokenizer.chat_template)
    settings = {"roles_to_train": ["assistant"], "train_on_eos": "turn"} | options
    strategy = ChatTemplateStrategy(prompter, tokenizer, False, 512, **settings)
    sample = strategy.tokenize_prompt({"messages": messages(texts)})
    return torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])


def prompt_ids(tokenizer, texts):
    ids = tokenizer.apply_chat_template(
        messages(texts), add_generation_prompt=True, return_dict=False
    )
    return torch.tensor([ids])


def trained_columns(labels):
    return (labels[0] != -100).nonzero().flatten().tolist()


@torch.no_grad()
def trained_logits(model, ids, labels):
    """What predicts each trained token in a training forward."""
    logits = model(ids, labels=labels).logits[0]
    return {column: logits[column - 1] for column in trained_columns(labels)}


class Forced:
    """Makes ``generate`` say what was said, and keeps what it would have said."""

    def __init__(self, ids):
        self.ids, self.logits = ids, {}

    def __call__(self, seen, scores):
        column = seen.shape[1]
        self.logits[column] = scores[0].clone()
        return torch.full_like(scores, -1e9).scatter(1, self.ids[:, [column]], 0.0)


def say(model, forced, prompt, until, **settings):
    """Generate the tokens of ``forced`` from the end of ``prompt`` to ``until``."""
    return model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=until - prompt.shape[1],
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([forced]),
        **settings,
    )


def turn_ends(tokenizer, texts, labels):
    """Where the prompts end that are handed to `generate`, and where the answers."""
    columns = trained_columns(labels)
    ends = [c + 1 for c in columns if c + 1 not in columns]
    begins = [
        prompt_ids(tokenizer, texts[: number + 1]).shape[1]
        for number in range(0, len(texts), 2)
    ]
    return list(zip(begins, ends, strict=True))


def assert_agree(got, expected):
    assert set(got) >= set(expected)
    for column, logits in expected.items():
        assert (got[column] - logits).abs().max() < TOLERANCE, column


@pytest.mark.parametrize("positions", ["f2+l3", "l1", "f40+l40", "all"])
def test_prefilled_whole_and_then_answered(tokenizer, turns, positions):
    model = adapted(tokenizer, turns, positions=positions)
    for texts in CONVERSATIONS:
        ids, labels = tokenized(tokenizer, texts)
        expected = trained_logits(model, ids, labels)
        forced = Forced(ids)
        for begin, end in turn_ends(tokenizer, texts, labels):
            say(model, forced, ids[:, :begin], end)
        assert_agree(forced.logits, expected)


def test_an_answer_that_has_begun_goes_on(tokenizer, turns):
    """As with `continue_final_message`: what is handed over of it is no prompt."""
    model = adapted(tokenizer, turns)
    texts = CONVERSATIONS[0]
    ids, labels = tokenized(tokenizer, texts)
    expected, forced = trained_logits(model, ids, labels), Forced(ids)
    for begin, end in turn_ends(tokenizer, texts, labels):
        say(model, forced, ids[:, : begin + 2], end)
        expected = {c: y for c, y in expected.items() if c not in (begin, begin + 1)}
    assert_agree(forced.logits, expected)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("positions", ["f2+l3", "l1", "f40+l40", "all"])
def test_played_turn_by_turn_on_a_reused_cache(tokenizer, turns, positions, copies):
    model = adapted(tokenizer, turns, positions=positions)
    for texts in CONVERSATIONS:
        ids, labels = tokenized(tokenizer, texts)
        expected = trained_logits(model, ids, labels)
        forced, cache = Forced(ids), DynamicCache(config=model.config)
        for begin, end in turn_ends(tokenizer, texts, labels):
            say(model, forced, ids[:, :begin], end, past_key_values=cache)
            cache = copy.deepcopy(cache) if copies else cache
        assert_agree(forced.logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("taken_back", [0, 2])
def test_played_token_by_token_without_generate(tokenizer, turns, taken_back):
    """From a buffer that is written again; after each step, some tokens more are tried
    and taken back."""
    model = adapted(tokenizer, turns)
    texts = CONVERSATIONS[0]
    ids, labels = tokenized(tokenizer, texts)
    expected = trained_logits(model, ids, labels)
    cache, start, got = DynamicCache(config=model.config), 0, {}
    for begin, end in turn_ends(tokenizer, texts, labels):
        # the end of the last answer, and the next prompt, in one chunk
        for stop in range(begin, end):
            buffer = ids[:, start:stop].clone()
            logits = model(buffer, past_key_values=cache).logits[0]
            got[stop], start = logits[-1], stop
            buffer.zero_()
            for _ in range(taken_back):
                model(buffer[:, -1:], past_key_values=cache)
            cache.crop(stop)
    assert_agree(got, expected)


@torch.no_grad()
def test_the_whole_conversation_in_one_forward_without_labels(tokenizer, turns):
    model = adapted(tokenizer, turns)
    ids, labels = tokenized(tokenizer, CONVERSATIONS[0])
    whole = model(ids).logits[0]
    for column, logits in trained_logits(model, ids, labels).items():
        assert (whole[column - 1] - logits).abs().max() < TOLERANCE


def test_axolotls_chat_plays_what_was_trained(tokenizer, turns, monkeypatch):
    """`axolotl inference --chat`, which renders anew and reuses the cache."""
    model = adapted(tokenizer, turns)
    texts = CONVERSATIONS[0]
    ids, labels = tokenized(tokenizer, texts)
    expected = trained_logits(model, ids, labels)
    forced, generate = Forced(ids), model.generate
    ends = dict(turn_ends(tokenizer, texts, labels))

    def forced_generate(**kwargs):
        begin = kwargs["input_ids"].shape[1]
        return generate(
            **kwargs,
            max_new_tokens=ends[begin] - begin,
            logits_processor=LogitsProcessorList([forced]),
        )

    monkeypatch.setattr(model, "generate", forced_generate)
    chat = CausalTurnGenerator(model, tokenizer, tokenizer.chat_template, "cpu")
    config = GenerationConfig(
        do_sample=False, return_dict_in_generate=True, pad_token_id=0
    )
    monkeypatch.setattr(chat, "_build_generation_config", lambda params: config)
    conversation = []
    for number in range(0, len(texts), 2):
        conversation.append({"role": "user", "content": texts[number]})
        turn = chat.generate_turn(conversation, {"seed": None}, lambda text: None)
        assert turn.content == texts[number + 1]
        assert bool(turn.reused_tokens) == bool(number)
        conversation.append(turn.message)
    assert_agree(forced.logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("short", [True, False])
def test_a_cache_that_ends_within_a_prompt_is_cut_back(tokenizer, turns, short):
    """As after /undo and another question that begins alike."""
    model = adapted(tokenizer, turns, positions="f40+l40")
    asked = ["hi", "yes", "you and me" if short else "you and me and all the others"]
    instead = [*asked[:2], "you and all of them, and me, and the rest"]
    ids, other = (prompt_ids(tokenizer, texts) for texts in (asked, instead))
    expected = model.generate(
        input_ids=other, max_new_tokens=3, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    cache = DynamicCache(config=model.config)
    model.generate(
        input_ids=ids, past_key_values=cache, max_new_tokens=2, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    shared = int(
        (ids[0, : other.shape[1]] == other[0, : ids.shape[1]]).cumprod(0).sum()
    )
    cache.crop(shared - cache.get_seq_length())
    got = model.generate(
        input_ids=other, past_key_values=cache, max_new_tokens=3, do_sample=False,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    for one, logits in zip(got.logits, expected.logits, strict=True):
        assert (one - logits).abs().max() < TOLERANCE


@torch.no_grad()
def test_packed_conversations_are_edited_as_alone(tokenizer, turns):
    model = adapted(tokenizer, turns)
    samples = [tokenized(tokenizer, texts) for texts in CONVERSATIONS]
    ids = torch.cat([ids for ids, _ in samples], 1)
    labels = torch.cat([labels for _, labels in samples], 1)
    positions = torch.cat([torch.arange(ids.shape[1]) for ids, _ in samples])[None]
    row = model(ids, labels=labels, position_ids=positions, use_cache=False).logits[0]
    start = 0
    for one, wanted in samples:
        for column, logits in trained_logits(model, one, wanted).items():
            assert (row[start + column - 1] - logits).abs().max() < TOLERANCE
        start += one.shape[1]


@torch.no_grad()
def test_a_left_padded_batch_of_conversations(tokenizer, turns):
    model = adapted(tokenizer, turns)
    prompts = [prompt_ids(tokenizer, texts[:-1]) for texts in CONVERSATIONS]
    width = max(prompt.shape[1] for prompt in prompts)
    batch = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, width - prompt.shape[1] :] = prompt
        mask[row, width - prompt.shape[1] :] = 1
    settings = {
        "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    got = model.generate(input_ids=batch, attention_mask=mask, **settings)
    for row, prompt in enumerate(prompts):
        alone = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings
        )
        for one, logits in zip(got.logits, alone.logits, strict=True):
            assert (one[row] - logits[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [{"train_on_eos": "last"}, {"train_on_eos": "none"}],
)
def test_what_is_trained_does_not_move_the_prompts(tokenizer, options):
    """Marks tell the turns, so labels of other tokens change no edit."""
    model = adapted(tokenizer)
    ids, labels = tokenized(tokenizer, CONVERSATIONS[0])
    _, others = tokenized(tokenizer, CONVERSATIONS[0], **options)
    assert not torch.equal(labels, others)
    with torch.no_grad():
        expected, got = (model(ids, labels=y).logits for y in (labels, others))
    assert torch.equal(got, expected)


@torch.no_grad()
def test_trained_questions_are_refused_in_a_forward(tokenizer):
    """Where no collator has seen them."""
    model = adapted(tokenizer)
    ids, labels = tokenized(tokenizer, CONVERSATIONS[0])
    model(ids, labels=labels)
    _, labels = tokenized(tokenizer, CONVERSATIONS[0], roles_to_train=["user"])
    with pytest.raises(ValueError, match="turn_markers: the labels train"):
        model(ids, labels=labels)


TOOL_CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "look", "arguments": {"at": "it"}},
}
WITH_TOOLS = (
    {"role": "user", "content": "how is it?"},
    {"role": "assistant", "content": "", "tool_calls": [TOOL_CALL]},
    {"role": "tool", "content": "fine", "name": "look", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "ANSWER", "thinking": "THOUGHT"},
    {"role": "user", "content": "and you?"},
    {"role": "assistant", "content": "LAST", "thinking": "MORE"},
)


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("axolotl/mistral_v3_tekken", ["ANSWER</s>", "LAST</s>"]),
        ("trl/glm4moe", ["ANSWER", "LAST"]),
        ("trl/deepseekv3_training", ["ANSWER", "LAST"]),
        (
            "trl/gptoss",
            [
                "<|channel|>final<|message|>ANSWER<|end|>",
                "<|channel|>analysis<|message|>MORE<|end|><|start|>assistant"
                "<|channel|>final<|message|>LAST",
            ],
        ),
    ],
)
def test_answers_after_tools_and_thoughts_are_played_as_trained(name, trained, turns):
    tokenizer = build_tokenizer_for(template_files()[name].read_text())
    model = adapted(tokenizer, turns, positions="f3+l4")
    text = tokenizer.apply_chat_template(WITH_TOOLS, tokenize=False)
    parts = [tokenizer(part, add_special_tokens=False).input_ids for part in trained]
    found = tokenizer(text, add_special_tokens=False).input_ids
    ids, labels = torch.tensor([found]), torch.full((1, len(found)), -100)
    ends = []
    for part in parts:
        begin = next(
            at for at in range(len(found)) if found[at : at + len(part)] == part
        )
        ends.append((begin, begin + len(part)))
        labels[0, begin : begin + len(part)] = ids[0, begin : begin + len(part)]
    expected, forced = trained_logits(model, ids, labels), Forced(ids)
    for begin, end in ends:
        say(model, forced, ids[:, :begin], end)
    assert_agree(forced.logits, expected)


def test_turns_differ_where_there_are_several(tokenizer):
    texts = CONVERSATIONS[0]
    ids, labels = tokenized(tokenizer, texts)
    models = [adapted(tokenizer, turns) for turns in ("every", "first")]
    every, first = (trained_logits(model, ids, labels) for model in models)
    (_, end), *later = turn_ends(tokenizer, texts, labels)
    for column in trained_columns(labels[:, :end]):
        assert (every[column] - first[column]).abs().max() < TOLERANCE
    for begin, end in later:
        columns = [c for c in every if begin <= c < end]
        assert all((every[c] - first[c]).abs().max() > 0.01 for c in columns)


def test_the_marks_of_the_template(template, tokenizer):
    found = turn_markers(tokenizer)
    marks = [tokenizer.decode(ids) for ids in found["generation_prompts"]]
    assert marks == [
        {
            "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "chatml": "<|im_start|>assistant\n",
            "gemma": "<start_of_turn>model\n",
            "mistral_v1": " [/INST]",
        }[template]
    ]
    ends = {tokenizer.decode([token]) for token in found["end_of_turn"]}
    assert {EOS[template]} <= ends <= {EOS[template], tokenizer.eos_token}


def test_marks_reach_no_further_than_their_sample():
    """A sample after one that was cut off within an answer begins with a prompt."""
    turns = Turns.parse("every", {"generation_prompts": [[7, 8]], "end_of_turn": [9]})
    ids = torch.tensor([[3, 9, 7, 8, 4, 4, 3, 9, 4, 7, 8, 4, 9, 3]])
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[0, [0, 6]] = True
    answer, opens = turns.answers(ids, starts)
    assert answer.long().tolist() == [[0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0]]
    assert opens[0].nonzero().flatten().tolist() == [3, 10]
    answer, opens = turns.answers(ids[:, :3], None)
    assert not answer.any() and not opens.any()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no token stands betw"),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '. ' }}{% endfor %}",
            "no special token ends an answer",
        ),
        ("{{ raise_exception('never') }}", "it failed on a plain conversation: never"),
    ],
)
def test_a_template_without_marks_is_refused(template, reason):
    with pytest.raises(ValueError, match=f"cannot be told apart: {reason}"):
        turn_markers(build_chat_tokenizer("chatml"), template)


def test_a_tokenizer_without_template_is_refused():
    tokenizer = build_chat_tokenizer("chatml")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template, so it marks no turns"):
        turn_markers(tokenizer)


@pytest.mark.parametrize(
    "markers",
    [
        {},
        {"generation_prompts": [], "end_of_turn": [2]},
        {"generation_prompts": [[]], "end_of_turn": [2]},
        {"generation_prompts": [[1]], "end_of_turn": []},
        {"generation_prompts": [[1.5]], "end_of_turn": [2]},
        {"generation_prompts": [1], "end_of_turn": [2]},
        {"generation_prompts": [[1]], "end_of_turn": [2], "more": 1},
        [[1], [2]],
    ],
)
def test_markers_that_mark_nothing_are_refused(markers):
    with pytest.raises(ValueError, match="turn_markers: .* is not understood"):
        Turns.parse("every", markers)


def test_other_words_for_turns_are_refused():
    with pytest.raises(ValueError, match="turns: 'last' is unknown. Write turns: ever"):
        Turns.parse("last")


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("qwen3", "<|im_start|>assistant\n"),  # and not its <think>
        ("gemma3", "<start_of_turn>model\n"),
        ("phi_35", "<|assistant|>\n"),
        ("mistral_v3_tekken", "[/INST]"),
    ],
)
def test_the_marks_of_other_templates(name, mark):
    tokenizer = build_chat_tokenizer("chatml")
    found = turn_markers(tokenizer, get_chat_template(name))
    assert [tokenizer.decode(ids) for ids in found["generation_prompts"]] == [mark]
