"""Print what LoReFT changed, and fail when the demo's promise is not kept.

Run from the repository root, after make_base.py and `axolotl train`:
`python examples/tiny-llama/report.py`. It takes about ten seconds.
"""

import json
from itertools import compress

from peft import PeftModel
from task import (
    BASE_DIR,
    BASE_WORDS,
    DATA_DIR,
    NEW_MEANING,
    NEW_WORD,
    OUT_DIR,
    Example,
    answer,
    exact_match,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import axolotl_reft  # noqa: F401  (registers the method LOREFT with PEFT)

SHOWN_EXAMPLES = 5
MAX_NEW_BEFORE = 0.10
MIN_NEW_AFTER = 0.95
MIN_BASE = 0.95
MAX_SHARE = 0.01


def read_examples(name: str) -> list[Example]:
    """Read one data file."""
    text = (DATA_DIR / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def print_examples(examples: list[Example], *answers: list[str]) -> None:
    """Print prompts with the answers before and after training."""
    print(f"{'prompt':<22}{'before':<18}{'after':<18}right")
    rows = zip(examples, *answers, strict=True)
    for example, before, after in list(rows)[:SHOWN_EXAMPLES]:
        prompt, right = example["instruction"], example["output"]
        print(f"{prompt:<22}{before:<18}{after:<18}{right}")


def print_result(label: str, share: float, promise: str, kept: bool = True) -> bool:
    """Print a measured share beside what was promised, and pass the verdict on."""
    verdict = "" if kept else "   NOT KEPT"
    print(f"{label:<36}{share:>9.2%}   {promise}{verdict}")
    return kept


def at_most(label: str, share: float, limit: float) -> bool:
    """Print and judge a share that must be small."""
    return print_result(label, share, f"at most {limit:.0%}", share <= limit)


def at_least(label: str, share: float, limit: float, reason: str = "") -> bool:
    """Print and judge a share that must be large."""
    return print_result(label, share, f"at least {limit:.0%}{reason}", share >= limit)


def print_adapter_on(answers: list[str], examples: list[Example]) -> None:
    """Print how the base's own tasks fare while the adapter edits their prompts."""
    no_promise = "not promised"
    measured = exact_match(answers, examples)
    print_result("base tasks, adapter on", measured, no_promise)
    for word in BASE_WORDS:
        of_word = [
            example["instruction"].endswith(f" {word} =") for example in examples
        ]
        chosen = list(compress(examples, of_word))
        share = exact_match(list(compress(answers, of_word)), chosen)
        print_result(f"  of these, {word}", share, no_promise)
    print(
        f"\nAn adapter that is on edits every prompt, and this one was trained on "
        f"{NEW_WORD} alone.\nFor the base's own tasks switch it off, or train it on "
        "them as well."
    )


def main() -> None:
    """Measure, print, judge."""
    new_test, base_test = read_examples("test.jsonl"), read_examples("base_test.jsonl")
    new_prompts = [example["instruction"] for example in new_test]
    base_prompts = [example["instruction"] for example in base_test]

    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    base = AutoModelForCausalLM.from_pretrained(BASE_DIR)
    base_size = base.num_parameters()
    before = answer(base, tokenizer, new_prompts)
    model = PeftModel.from_pretrained(base, OUT_DIR)
    adapter_size = sum(p.numel() for p in model.parameters()) - base_size
    after = answer(model, tokenizer, new_prompts)
    edited_answers = answer(model, tokenizer, base_prompts)
    with model.disable_adapter():
        base_answers = answer(model, tokenizer, base_prompts)

    print_examples(new_test, before, after)
    print(
        f"\nnew task: {NEW_WORD}, a word that the base never saw, for a skill that it"
    )
    print(f"has and was trained to use at the word {NEW_MEANING}")
    print(f"test prompts: new task {len(new_test)}, base tasks {len(base_test)}")
    print(f"parameters: model {base_size:,}, adapter {adapter_size:,}")
    print(
        f"the adapter's share is {adapter_size / base_size:.4%} of the model's; "
        f"axolotl's trainable% is\nits share of both together, "
        f"{adapter_size / (base_size + adapter_size):.4%}\n"
    )
    print(f"{'exact match':<36}{'measured':>9}   promised")
    kept = [
        at_most("new task, before", exact_match(before, new_test), MAX_NEW_BEFORE),
        at_least("new task, after", exact_match(after, new_test), MIN_NEW_AFTER),
        at_least(
            "base tasks, adapter disabled",
            exact_match(base_answers, base_test),
            MIN_BASE,
            ", as it must be: the base is frozen",
        ),
        at_most("adapter's share of parameters", adapter_size / base_size, MAX_SHARE),
    ]
    print_adapter_on(edited_answers, base_test)
    if not all(kept):
        raise SystemExit("the demo's promise is not kept")


if __name__ == "__main__":
    main()
