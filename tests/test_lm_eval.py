"""LoReFT as a model of lm_eval: each request's context is its prompt, and nothing else.

The expected scores come from plain forwards with labels, one request at a time.
"""

import pytest
import torch
from conftest import build_adapter
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers import LlamaForCausalLM as Llama
from workspace import build_task, build_tokenizer

from axolotl_reft.lm_eval import LoreftLM

# More rows than the tokenizer has words, as models pad their vocabularies.
ROWS = 40
CONTEXTS = ["a b c d e f :", "g :", "", "h i j k l m n o p q :"]
CONTINUATIONS = [" m", " n", " m n o", " m n p", " q r s t u"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base, and an adapter that edits both ends of a prompt."""
    root = tmp_path_factory.mktemp("lm_eval")
    build_tokenizer().save_pretrained(root / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    Llama(config).save_pretrained(root / "base")
    for positions in ("f2+l2", "all"):
        base = AutoModelForCausalLM.from_pretrained(root / "base")
        adapter = build_adapter(base, positions=positions, rank=4)
        adapter.save_pretrained(root / positions)
    return root


@pytest.fixture(scope="module")
def loaded(saved):
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    model = PeftModel.from_pretrained(base, saved / "f2+l2").eval()
    return model, AutoTokenizer.from_pretrained(saved / "base")


@torch.no_grad()
def by_hand(loaded, context, continuation, longest=None, with_labels=True):
    """The score of a continuation, all of it in one row and marked by labels."""
    model, tokenizer = loaded
    ids = tokenizer(context + continuation).input_ids
    prompt = len(tokenizer(context).input_ids)
    if longest is not None and len(ids) > longest + 1:
        prompt -= len(ids) - longest - 1
        ids = ids[-longest - 1 :]
    row = torch.tensor([ids])
    labels = torch.tensor([[-100] * prompt + ids[prompt:]])
    logits = model(row, labels=labels if with_labels else None).logits[0]
    scores = logits.log_softmax(-1)[prompt - 1 : -1]
    answer = row[0, prompt:]
    return (
        scores.gather(1, answer[:, None]).sum().item(),
        bool((scores.argmax(1) == answer).all()),
    )


def ask(lm, pairs):
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    return lm.loglikelihood(requests, disable_tqdm=True)


PAIRS = [(context, end) for context in CONTEXTS for end in CONTINUATIONS]


@pytest.mark.parametrize("batch_size", [1, 3, 64, "auto"])
def test_scores_are_those_of_forwards_with_labels(saved, loaded, batch_size):
    lm = LoreftLM(peft=str(saved / "f2+l2"), batch_size=batch_size, max_batch_size=4)
    scores = ask(lm, PAIRS)
    expected = [by_hand(loaded, *pair) for pair in PAIRS]
    assert [s[0] for s in scores] == pytest.approx([e[0] for e in expected], abs=1e-4)
    assert [s[1] for s in scores] == [e[1] for e in expected]


def test_context_and_continuation_as_one_prompt_would_score_otherwise(loaded):
    for pair in PAIRS[:5]:
        right, _ = by_hand(loaded, *pair)
        wrong, _ = by_hand(loaded, *pair, with_labels=False)
        assert abs(right - wrong) > 1e-2


def test_the_same_tokens_split_elsewhere_have_another_prompt(saved, loaded):
    """lm_eval would take one forward for both."""
    pairs = [("a b c d", " e f g h"), ("a b c d e f g", " h")]
    lm = LoreftLM(peft=str(saved / "f2+l2"), batch_size=2)
    long, short = (score for score, _ in ask(lm, pairs))
    assert long == pytest.approx(by_hand(loaded, *pairs[0])[0], abs=1e-4)
    assert short == pytest.approx(by_hand(loaded, *pairs[1])[0], abs=1e-4)


def test_one_token_continuations_of_a_context_share_a_forward(saved, monkeypatch):
    lm = LoreftLM(peft=str(saved / "f2+l2"), batch_size=64)
    rows = []
    forward = lm.model.forward
    monkeypatch.setattr(
        lm.model,
        "forward",
        lambda **inputs: rows.append(len(inputs["input_ids"])) or forward(**inputs),
    )
    ask(lm, [("a b :", f" {letter}") for letter in "cdef"])
    assert rows == [1]


def test_contexts_cut_from_the_left_are_prompts_as_cut(saved, loaded):
    lm = LoreftLM(peft=str(saved / "f2+l2"), batch_size=4, max_length=6)
    pairs = [pair for pair in PAIRS if pair[0]]
    scores = [score for score, _ in ask(lm, pairs)]
    expected = [by_hand(loaded, *pair, longest=6)[0] for pair in pairs]
    assert scores == pytest.approx(expected, abs=1e-4)
    assert abs(expected[-1] - by_hand(loaded, *pairs[-1])[0]) > 1e-2


def test_generation_answers_as_each_prompt_alone(saved, loaded):
    model, tokenizer = loaded
    until = {"until": [], "max_gen_toks": 6, "do_sample": False}
    lm = LoreftLM(peft=str(saved / "f2+l2"), batch_size=3)
    prompts = [context for context in CONTEXTS if context]
    requests = [Instance("generate_until", {}, (text, until), 0) for text in prompts]
    expected = []
    for text in prompts:
        batch = tokenizer(text, return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=6, do_sample=False)[0]
        answer = ids[batch.input_ids.shape[1] :]
        expected.append(tokenizer.decode(answer, skip_special_tokens=True))
    assert lm.generate_until(requests, disable_tqdm=True) == expected


def test_whole_texts_have_no_prompt(saved):
    lm = LoreftLM(peft=str(saved / "f2+l2"))
    request = Instance("loglikelihood_rolling", {}, ("a b c d e",), 0)
    with pytest.raises(ValueError, match="such texts have no prompt, so that nothing"):
        lm.loglikelihood_rolling([request])


@torch.no_grad()
def test_whole_texts_are_scored_where_every_token_is_edited(saved):
    lm = LoreftLM(peft=str(saved / "all"), batch_size=2)
    text = "a b c d e f"
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    tokenizer = lm.tokenizer
    # lm_eval puts a beginning token before the text's own.
    row = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
    scores = lm.model(row).logits[0].log_softmax(-1)[:-1]
    expected = scores.gather(1, row[0, 1:, None]).sum().item()
    (score,) = lm.loglikelihood_rolling([request], disable_tqdm=True)
    assert score == pytest.approx(expected, abs=1e-4)


def test_the_vocabulary_keeps_its_rows(saved):
    lm = LoreftLM(peft=str(saved / "f2+l2"))
    assert lm.model.get_input_embeddings().num_embeddings == ROWS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "peft: no adapter is given; name its directory"),
        ({"peft": "nowhere"}, "peft: there is no readable adapter in 'nowhere'"),
    ],
)
def test_without_an_adapter_nothing_is_scored(settings, message):
    with pytest.raises(ValueError, match=message):
        LoreftLM(**settings)


def test_an_adapter_of_another_base_stops_before_it_loads(saved, monkeypatch):
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=64, num_attention_heads=2, num_hidden_layers=2
    )
    config.save_pretrained(saved / "wider")
    with pytest.raises(ValueError, match="hidden size 32, this base has 64"):
        LoreftLM(str(saved / "wider"), peft=str(saved / "f2+l2"))


def test_a_model_without_the_adapter_is_refused(saved):
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    for model in (base, get_peft_model(base, LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(ValueError, match="without a LoReFT adapter; load one"):
            LoreftLM(model)


def test_a_local_task(saved, loaded, tmp_path):
    rows = build_task(tmp_path / "tasks")
    results = simple_evaluate(
        model="loreft",
        model_args=f"pretrained={saved / 'base'},peft={saved / 'f2+l2'}",
        tasks=["letters"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks")),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )
    right = 0
    for row, sample in zip(rows, results["samples"]["letters"], strict=True):
        pairs = [(row["text"], " " + choice) for choice in row["choices"]]
        expected = [by_hand(loaded, *pair)[0] for pair in pairs]
        got = [score for (score, _), *_ in sample["resps"]]
        assert got == pytest.approx(expected, abs=1e-4)
        right += expected.index(max(expected)) == row["right"]
    assert results["results"]["letters"]["acc,none"] == right / len(rows)
