"""Continuations of one context are scored on its cache, as whole rows would be.

The expected scores are those of whole rows, one in each forward.
"""

import random

import pytest
import torch
from conftest import ARCHITECTURES, build_adapter, build_model
from transformers import AutoConfig, AutoModelForCausalLM
from workspace import build_tokenizer

from axolotl_reft import LoreftConfig, lm_eval
from axolotl_reft.lm_eval import LoreftLM

TOLERANCE = 1e-4
MARK, END = (5, 6), 7
MARKERS = {"generation_prompts": [[*MARK]], "end_of_turn": [END]}


@pytest.fixture(autouse=True)
def _is_worth_it(monkeypatch):
    """However short the contexts are."""
    monkeypatch.setitem(lm_eval._LEAST_TOKENS, "cpu", 0)


def asked(seed=0, longest=25):
    """Requests in no order, of contexts that occur once or several times."""
    draw = random.Random(seed)

    def some(count):
        return [draw.randrange(8, 64) for _ in range(count)]

    requests = []
    for length in (1, 2, 9, 9, 14, longest):
        context = some(length)
        for count in (1, 1, 2, 3, 6)[: draw.choice([1, 2, 5])]:
            requests.append((("", ""), context, some(count)))
    # Equal tokens that are split elsewhere.
    text = some(12)
    requests += [(("", ""), text[:n], text[n:]) for n in (5, 8, 11)]
    draw.shuffle(requests)
    return requests


class Recorded(LoreftLM):
    """Keeps the names and shapes of what its forwards are given."""

    def __init__(self, model, **settings):
        settings = {"batch_size": 4, "max_length": 40, "device": "cpu"} | settings
        super().__init__(model, tokenizer=build_tokenizer(), **settings)
        self.forwards = []

    def _forward(self, **inputs):
        shape = tuple(inputs["input_ids"].shape)
        self.forwards.append((shape, "past_key_values" in inputs))
        return super()._forward(**inputs)

    def ask(self, requests):
        self.forwards.clear()
        return self._loglikelihood_tokens(requests, disable_tqdm=True)

    @property
    def on_caches(self):
        return [shape for shape, on_cache in self.forwards if on_cache]


def alone(model, requests, **settings):
    lm = Recorded(model, batch_size=1, **settings)
    return [lm.ask([request])[0] for request in requests]


def assert_same(got, expected):
    assert [s[0] for s in got] == pytest.approx([e[0] for e in expected], abs=TOLERANCE)
    assert [s[1] for s in got] == [e[1] for e in expected]


@pytest.mark.parametrize("batch_size", [1, 3, 64, "auto"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("positions", ["f2+l3", "f7", "l2", "all"])
def test_scores_are_those_of_whole_rows(positions, tied, batch_size):
    model = build_adapter(build_model(), positions=positions, tied_weights=tied)
    lm, requests = Recorded(model, batch_size=batch_size, max_batch_size=4), asked()
    got = lm.ask(requests)
    assert lm.on_caches
    assert_same(got, alone(model, requests))


LORA = {"r": 3, "target_modules": ["q_proj", "down_proj"]}


@pytest.mark.parametrize("settings", [{"lora": LORA}, {"positions": "f1+l1"}], ids=str)
def test_lora_and_a_second_adapter_have_their_part(settings):
    model = build_adapter(build_model(), **settings)
    if "lora" not in settings:
        torch.manual_seed(3)
        model.add_adapter("other", LoreftConfig(task_type="CAUSAL_LM", positions="l2"))
        for name, parameter in model.named_parameters():
            if ".other" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
        model.base_model.set_adapter(["default", "other"])
    lm, requests = Recorded(model), asked()
    got = lm.ask(requests)
    assert lm.on_caches
    assert_same(got, alone(model, requests))


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mistral, windows that are full"])
def test_bases_with_caches_of_keys_and_values(name):
    kind, _, is_sliding = name.partition(",")
    settings = {"sliding_window": 6} if is_sliding else {}
    model = build_adapter(build_model(kind, **settings))
    lm, requests = Recorded(model), asked()
    got = lm.ask(requests)
    assert lm.on_caches
    assert_same(got, alone(model, requests))


OTHERS = {
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    },
    # Its cache of keys and values has the states of the other layers beside them.
    "minimax": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_local_experts": 2, "num_experts_per_tok": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_bases_with_other_states_score_whole_rows(kind):
    """Known by the first context's cache."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, pad_token_id=0, **OTHERS[kind],
    )  # fmt: skip
    config.initializer_range = 0.2
    model = build_adapter(AutoModelForCausalLM.from_config(config).eval())
    lm, requests = Recorded(model, batch_size=1), asked()
    got, expected = lm.ask(requests), alone(model, requests)
    assert [s[0] for s in got] == pytest.approx([e[0] for e in expected], abs=1e-3)
    rows = {(*context, -1, *answer[:-1]) for _, context, answer in requests}
    assert not lm.on_caches and len(lm.forwards) == len(rows) + 1


def test_a_base_that_is_told_to_use_no_cache_uses_it_here():
    base = build_model()
    base.config.use_cache = False
    lm = Recorded(build_adapter(base))
    lm.ask(asked())
    assert lm.on_caches


def test_contexts_are_computed_once_and_equally_long_ones_together():
    model = build_adapter(build_model())
    contexts = [[*range(10, 10 + n)] for n in (9, 9, 9, 12)]
    contexts[1][3], contexts[2][3] = 50, 51
    requests = [(None, c, [n, *[20] * n, 8]) for c in contexts for n in range(2)]
    lm = Recorded(model, batch_size=4)
    got = lm.ask(requests)
    assert lm.forwards == [
        ((1, 12), False), ((2, 2), True),
        ((2, 9), False), ((4, 2), True),
        ((1, 9), False), ((2, 2), True),
    ]  # fmt: skip
    assert_same(got, alone(model, requests))


def test_no_forward_has_more_rows_than_a_batch():
    model = build_adapter(build_model())
    requests = [(None, [*range(10, 20)], [n, n, n]) for n in range(20, 27)]
    lm = Recorded(model, batch_size=3)
    got = lm.ask(requests)
    assert [shape for shape, _ in lm.forwards] == [(1, 10), (3, 2), (3, 2), (1, 2)]
    assert_same(got, alone(model, requests))


def test_contexts_with_one_continuation_share_forwards_as_whole_rows():
    model = build_adapter(build_model())
    requests = [(None, [*range(10, 20 + n)], [8, 9, n]) for n in range(6)]
    # Continuations that differ in their last token alone are of one row.
    requests += [(None, [*range(20, 30)], [8, n]) for n in range(10, 14)]
    lm = Recorded(model, batch_size=4)
    got = lm.ask(requests)
    assert lm.forwards == [((4, 17), False), ((3, 13), False)]
    assert_same(got, alone(model, requests))


@pytest.mark.parametrize(
    ("least", "size", "is_shared"),
    [
        (9, 1, True),
        (10, 1, False),
        (18, 2, False),
        (9, 2, True),
        (4, 64, True),
        (5, 64, False),
    ],
)
def test_contexts_too_short_to_be_worth_a_forward(monkeypatch, least, size, is_shared):
    """Two rows of 9 tokens; with more of them in a batch, a part of a forward more."""
    monkeypatch.setitem(lm_eval._LEAST_TOKENS, "cpu", least)
    model = build_adapter(build_model())
    requests = [(None, [*range(10, 19)], [n, n, n]) for n in range(20, 22)]
    lm = Recorded(model, batch_size=size)
    got = lm.ask(requests)
    assert bool(lm.on_caches) == is_shared
    assert_same(got, alone(model, requests))


@pytest.mark.parametrize("positions", ["f2+l3", "l7"])
def test_contexts_cut_from_the_left_are_other_contexts(positions):
    """As far as continuations of one context leave different parts of it."""
    model = build_adapter(build_model(), positions=positions)
    context = [*range(10, 30)]
    requests = [
        (None, context, [n] * count) for count in (1, 2, 2, 3, 3, 9) for n in (40, 41)
    ]
    lm = Recorded(model, max_length=10)
    got = lm.ask(requests)
    assert lm.on_caches
    assert_same(got, alone(model, requests, max_length=10))
    assert abs(got[3][0] - alone(model, requests, max_length=40)[3][0]) > 1e-2


def test_no_tokens_are_certain():
    lm = Recorded(build_adapter(build_model()))
    requests = [(None, [10, 11], []), (None, [10, 11], [12, 13]), (None, [10], [])]
    assert lm.ask(requests)[::2] == [(0.0, True)] * 2
    assert lm.forwards == [((1, 3), False)]


@pytest.mark.parametrize(("context", "answer"), [([8, 9], 5), ([], 2)])
def test_a_continuation_that_leaves_no_context_is_refused(context, answer):
    lm = Recorded(build_adapter(build_model()), max_length=4)
    said = (
        f"max_length: 4 leaves no token of a context of {len(context)} before a "
        f"continuation of {answer}; pass a larger max_length, or leave"
    )
    with pytest.raises(ValueError, match=said):
        lm.ask([(None, context, [*range(10, 10 + answer)])])


def test_what_was_scored_is_kept_for_another_run():
    lm, kept = Recorded(build_adapter(build_model())), {}
    requests = [
        ((f"{n}", "x"), context, answer)
        for n, (_, context, answer) in enumerate(asked())
    ]
    lm.cache_hook.add_partial = lambda kind, text, score: kept.update({text: score})
    got = lm.ask(requests)
    assert [kept[text] for text, *_ in requests] == got


@pytest.mark.parametrize("turns", ["every", "first"])
def test_conversations_are_read_as_in_whole_rows(turns):
    model = build_adapter(build_model(), turns=turns, turn_markers=MARKERS)
    chat = [*range(10, 18), *MARK, 30, 31, END, *range(20, 26), *MARK]
    answers = [
        [n, 40, 41, 42, 43, END, 50][:length] for n in (32, 33) for length in (3, 7)
    ]
    requests = [(None, chat, answer) for answer in answers]
    lm = Recorded(model)
    got = lm.ask(requests)
    assert lm.on_caches == [(4, 6)]
    assert_same(got, alone(model, requests))


def test_continuations_that_marks_take_for_a_prompt_are_refused_as_in_whole_rows():
    model = build_adapter(build_model(), turn_markers=MARKERS)
    chat = [*range(10, 18), *MARK, 30, 31, END, *range(20, 26)]
    requests = [(None, chat, [n, 40, *MARK, 41]) for n in (32, 33)]
    for asks in (lambda: alone(model, requests), lambda: Recorded(model).ask(requests)):
        with pytest.raises(ValueError, match="turn_markers: the labels train tokens"):
            asks()
