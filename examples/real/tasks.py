"""Tasks for adapters to learn: conversations, and which answers count as right."""

from __future__ import annotations

import json
import random
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from examples.real.packages import Package, PackagedFile, fetch

_HERE = Path(__file__).parent
KEPT = _HERE / "fetched"
WRITTEN = _HERE / "data"
# Held-out answers of each task, from whose examples they are taken first.
ANSWERS = 200
# Questions with their answers, in turns.
Conversation = Sequence[tuple[str, str]]
# Finds in a text what is compared.
Answer = Callable[[str], str | None]
# How they are asked, by the name of BIG-bench's task.
LINGUISTIC_MAPPINGS = {
    "sentence_negation": "Negate this sentence: ",
    "question_formation": "Turn this sentence into a question: ",
    "past_tense": "Write the past tense of this verb: ",
    "plural": "Write the plural of this noun: ",
}
QUESTION_TYPES = ("Humans", "Entity", "Date", "Quantity", "Location")
_TURNS = 3
_NUMBERS = dict(a=1, an=1, two=2, three=3, four=4, five=5)
# Snippets whose mean rating, from -4 to 4, is nearer to 0 are neither.
_CLEAR_RATING = 1
# By path below BIG-bench's tasks.
_BIG_BENCH_TASKS = {
    "linguistic_mappings/sentence_negation_json": (
        "5597a0f3eada26930344924b203e25fbecc0b77de6495cc2caa726e273be6dfc"
    ),
    "linguistic_mappings/question_formation_json": (
        "b301331de6a8d50653081ca631a153a0387a2da2f6a3019655bdff70e8df1729"
    ),
    "linguistic_mappings/past_tense_json": (
        "3b7bdd89621a1288ba51633387c9e5a6077bd33b8fff9ee60653d99ef72aa8c1"
    ),
    "linguistic_mappings/plural_json": (
        "0eadf3c471abe6e27ab1966c9c1f045708e2c9ecf9af3453dcfcf214ef5100de"
    ),
    "natural_instructions/subtask046_miscellaenous_question_typing": (
        "8aea2ed4a22e6bd1f07d3879eb790bb7a8d83ae9f1a2e156050c1b8cc629d5be"
    ),
    "object_counting": (
        "ec6371b4d9078a871ef6962d4991d2318db0b399cca78a0c90678972bdb115d6"
    ),
    "social_iqa": "edc9f568b70ae6d4af0783764dbe4e4f18aa1242c675a93f534338d73a565348",
}
_BIG_BENCH = Package(
    "bigbench==1.0.0",
    tuple(
        PackagedFile(f"benchmark_tasks/{path}/task.json", sha256)
        for path, sha256 in _BIG_BENCH_TASKS.items()
    ),
    source=True,
)
_REVIEWS = Package(
    "vaderSentiment==3.3.2",
    (
        PackagedFile(
            "additional_resources/hutto_ICWSM_2014.tar.gz",
            "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
        ),
    ),
    source=True,
)
_SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_T = TypeVar("_T")


def exact(text: str) -> str | None:
    """Return the text without white space around it."""
    return text.strip()


def first_of(*choices: str) -> Answer:
    """Return what finds the first choice that a text names, as in LLM-Adapters'
    evaluation."""
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, choices)) + r")\b", re.I)

    def found(text: str) -> str | None:
        match = pattern.search(text)
        return match and match.group().lower()

    return found


def last_number(text: str) -> str | None:
    """Return the last number of a text, as in LLM-Adapters' evaluation."""
    return next(iter(re.findall(r"\d+", text)[::-1]), None)


@dataclass(frozen=True)
class Task:
    """A task's conversations.

    Attributes:
        answer: what of an answer's text must be the same.
    """

    name: str
    train: Sequence[Conversation]
    validation: Sequence[Conversation]
    test: Sequence[Conversation]
    answer: Answer = exact

    def is_right(self, generated: str, answer: str) -> bool:
        """Tell whether a generated answer is the right one."""
        return self.answer(generated) == self.answer(answer)


def linguistic_mappings(
    examples: dict[str, list[dict[str, str]]],
) -> list[Conversation]:
    """Return conversations of three turns, each of another mapping, every example in
    one at most.

    Args:
        examples: BIG-bench's, with ``input`` and ``target``, by mapping.
    """
    shuffle = random.Random(0).shuffle
    left = {name: _shuffled(of) for name, of in examples.items()}
    conversations = list[Conversation]()
    while sum(map(bool, left.values())) == len(left):
        names = list(left)
        shuffle(names)
        drawn = [(name, left[name].pop()) for name in names[:_TURNS]]
        conversations.append(
            [
                (LINGUISTIC_MAPPINGS[name] + example["input"], example["target"])
                for name, example in drawn
            ]
        )
    return conversations


def multiple_choice(examples: list[dict[str, Any]]) -> list[Conversation]:
    """Return BIG-bench's questions with several choices, as LLM-Adapters writes
    them."""
    conversations = list[Conversation]()
    for example in _shuffled(examples):
        scores: dict[str, int] = example["target_scores"]
        numbered = {f"answer{n}": choice for n, choice in enumerate(scores, 1)}
        (right,) = (n for n, choice in numbered.items() if scores[choice])
        listed = "".join(f"{n.title()}: {of}\n\n" for n, of in numbered.items())
        question = (
            "Please choose the correct answer to the question: "
            f"{example['input'].strip()}\n\n{listed}"
            f"Answer format: {'/'.join(numbered)}"
        )
        conversations.append([(question, f"the correct answer is {right}")])
    return conversations


def question_types(examples: list[dict[str, Any]]) -> list[Conversation]:
    """Return natural-instructions' questions with the type of their answer, of those
    that have one of ``QUESTION_TYPES`` alone."""
    asked = f"\n\nWhat is the answer's type: {', '.join(QUESTION_TYPES)}?"
    typed = {f"{word}.": word for word in QUESTION_TYPES}
    return [
        [(example["input"].strip() + asked, typed[example["target"][0]])]
        for example in _shuffled(examples)
        if len(example["target"]) == 1 and example["target"][0] in typed
    ]


def object_counting(examples: list[dict[str, Any]]) -> list[Conversation]:
    """Return BIG-bench's word problems, answered by counting what is asked for. Some
    texts list other things as well; those without tell what an item is."""
    parsed = [_items(example["input"]) for example in examples]
    kinds = dict[str, str]()
    for example, (asked, counts) in zip(examples, parsed, strict=True):
        if sum(counts.values()) == int(example["target"][1]):
            kinds |= dict.fromkeys(counts, asked)
    conversations = list[Conversation]()
    for example, (asked, counts) in _shuffled(list(zip(examples, parsed, strict=True))):
        steps, total = list[str](), 0
        for name, number in counts.items():
            if kinds[name] == asked:
                total += number
                steps.append(f"{name} {total}")
        assert total == int(example["target"][1])
        answer = f"{', '.join(steps)}. The answer is {total}."
        conversations.append([(example["input"], answer)])
    return conversations


def item_lists(examples: list[dict[str, Any]]) -> list[Conversation]:
    """Return the texts of BIG-bench's word problems with what they list as JSON."""
    conversations = list[Conversation]()
    for example in _shuffled(examples):
        text = example["input"].partition(" How many ")[0]
        asked = f"Write the items of this text as JSON.\n\n{text}"
        conversations.append([(asked, json.dumps(_items(text)[1]))])
    return conversations


def _items(text: str) -> tuple[str, dict[str, int]]:
    """Return what a word problem asks for, and how many of each item it lists."""
    listed, _, asked = text.partition(" How many ")
    listed = listed.removeprefix("I have ").removesuffix(".").replace(" and ", " ")
    split = (item.strip().partition(" ") for item in listed.split(", "))
    counts = {name: _NUMBERS[number] for number, _, name in split}
    return asked.removesuffix(" do I have?"), counts


def review_sentiment(lines: list[str]) -> list[Conversation]:
    """Return clearly rated snippets of movie reviews with their sentiment, as many of
    either.

    Args:
        lines: number, mean rating and text, separated by tabs.
    """
    found: dict[str, list[str]] = {"positive": [], "negative": []}
    for line in lines:
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= _CLEAR_RATING:
            found["positive" if float(rating) > 0 else "negative"].append(text.strip())
    fewest = min(map(len, found.values()))
    chosen = [(text, word) for word, texts in found.items() for text in texts[:fewest]]
    return [
        [(f"Is this movie review positive or negative?\n\n{text}", word)]
        for text, word in _shuffled(chosen)
    ]


def _shuffled(items: list[_T]) -> list[_T]:
    return random.Random(0).sample(items, len(items))


def _read_linguistic_mappings(kept: Path) -> list[Conversation]:
    return linguistic_mappings(
        {
            name: _examples(f"linguistic_mappings/{name}_json", kept)
            for name in LINGUISTIC_MAPPINGS
        }
    )


def _read_social_iqa(kept: Path) -> list[Conversation]:
    return multiple_choice(_examples("social_iqa", kept))


def _read_question_types(kept: Path) -> list[Conversation]:
    path = "natural_instructions/subtask046_miscellaenous_question_typing"
    return question_types(_examples(path, kept))


def _read_object_counting(kept: Path) -> list[Conversation]:
    return object_counting(_examples("object_counting", kept))


def _read_item_lists(kept: Path) -> list[Conversation]:
    return item_lists(_examples("object_counting", kept))


def _read_review_sentiment(kept: Path) -> list[Conversation]:
    (file,) = fetch(_REVIEWS, kept)
    with tarfile.open(file) as archive:
        member = archive.extractfile(_SNIPPETS)
        assert member is not None
        # A few lines are not UTF-8.
        text = member.read().decode("latin-1")
    return review_sentiment(text.splitlines())


def _examples(path: str, kept: Path) -> list[dict[str, Any]]:
    files = dict(zip(_BIG_BENCH_TASKS, fetch(_BIG_BENCH, kept), strict=True))
    return json.loads(files[path].read_text())["examples"]


# By name: how the conversations are read, and what of an answer must be right.
TASKS: dict[str, tuple[Callable[[Path], list[Conversation]], Answer]] = {
    "linguistic mappings": (_read_linguistic_mappings, exact),
    "question types": (_read_question_types, first_of(*QUESTION_TYPES)),
    "item lists": (_read_item_lists, exact),
    "object counting": (_read_object_counting, last_number),
    "Social IQa": (_read_social_iqa, first_of("answer1", "answer2", "answer3")),
    "review sentiment": (_read_review_sentiment, first_of("positive", "negative")),
}


def load(name: str, answers: int = ANSWERS, kept: Path = KEPT) -> Task:
    """Return a task with so many held-out answers to test, half as many to validate and
    the rest to train."""
    read, answer = TASKS[name]
    conversations = read(kept)
    tested = answers // len(conversations[0])
    validated = tested // 2
    return Task(
        name,
        conversations[tested + validated :],
        conversations[tested : tested + validated],
        conversations[:tested],
        answer,
    )


def folder_of(name: str) -> str:
    """Return the name of a task's folder, which commands take, too."""
    return name.lower().replace(" ", "-")


def write(task: Task, written: Path = WRITTEN) -> Path:
    """Write a task as ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``, for
    axolotl's ``type: chat_template``, and return their folder."""
    folder = written / folder_of(task.name)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "validation", "test"):
        lines = [
            json.dumps({"messages": _messages(conversation)}, ensure_ascii=False)
            for conversation in getattr(task, part)
        ]
        text = "".join(f"{line}\n" for line in lines)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")
    return folder


def _messages(conversation: Conversation) -> list[dict[str, str]]:
    return [
        {"role": role, "content": content}
        for turn in conversation
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
