"""Requests that take the beginning of their prompt from other requests' cache."""

import pytest
from vllm_runs import ADAPTERS, END, MARK, Asked, ask, every, prompts

BLOCK = 32


@pytest.fixture(scope="module")
def llm(start):
    return start(enable_prefix_caching=True)


def test_repeats_shared_prefixes_and_follow_ups(llm, directory, check):
    begin = prompts((90,), seed=10)[0]
    texts = [begin[:n] for n in (33, 65, 70, 90)]
    texts += [begin + more for more in prompts((6, 40), seed=11)]
    for round_ in ("first", "again"):
        answers = ask(llm, directory, every(texts))
        check(f"prefix caching, shared prefixes, {round_}", answers)
    assert sum(answer.cached for answer in answers) > 0.5 * sum(
        len(answer.asked.prompt) for answer in answers
    )
    followed = [
        Asked(adapter, [*a.asked.prompt, *a.tokens, *more])
        for a in answers[::3]
        for adapter in {None, a.asked.adapter}
        for more in prompts((1, 30), seed=12)
    ]
    answers = ask(llm, directory, followed)
    assert sum(answer.cached > 0 for answer in answers) > 0.5 * len(answers)
    check("prefix caching, follow-ups", answers)


def test_conversations_with_marks_of_turns(llm, directory, check):
    texts = {adapter: [] for adapter in (None, *ADAPTERS)}
    answers = []
    for question in prompts((25, 9, 40), seed=13):
        asked = [Asked(a, [*ids, *question, *MARK]) for a, ids in texts.items()]
        found = ask(llm, directory, asked)
        for answer in found:
            ids = [*answer.asked.prompt, *answer.tokens, END]
            texts[answer.asked.adapter] = ids
        answers += found
        # Also the base and each other adapter on another's conversation.
        others = every([answer.asked.prompt for answer in found[:4]])
        answers += ask(llm, directory, others)
    assert sum(answer.cached > 0 for answer in answers) > 0.3 * len(answers)
    check("prefix caching, conversations", answers)


@pytest.mark.parametrize(
    ("adapter", "shared"),
    [("last", 192), ("last_of_two_layers", 224), ("first_and_last", 0), ("all", 0)],
)
def test_the_blocks_before_the_suffix_are_those_of_the_base(
    llm, directory, check, adapter, shared
):
    prompt = prompts((230,), seed=sum(adapter.encode()))[0]
    base = ask(llm, directory, [Asked(None, prompt)])
    first, again = (ask(llm, directory, [Asked(adapter, prompt)]) for _ in range(2))
    assert [a[0].cached for a in (base, first, again)] == [0, shared, 224]
    answers = base + first + again
    check(f"230 tokens, {adapter}: {shared} from the base's cache", answers)


def test_adapters_share_the_blocks_before_their_suffixes(llm, directory, check):
    prompt = prompts((230,), seed=30)[0]
    asked = [Asked(a, prompt) for a in ("last", "lobireft", "last_of_two_layers")]
    answers = [ask(llm, directory, [request])[0] for request in (*asked, asked[0])]
    assert [answer.cached for answer in answers] == [0, 192, 224, 224]
    check("230 tokens, l7, l3 and l1 after each other", answers)
