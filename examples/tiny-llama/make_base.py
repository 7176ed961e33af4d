"""Train the demo's base model from scratch and write the demo's data.

Run from the repository root: `python examples/tiny-llama/make_base.py`. It takes 2 to
3 minutes on one CPU core and writes `base/` and `data/` beside this file.
"""

import json
import random
import shutil
import time
from itertools import islice

import torch
from task import (
    BASE_DIR,
    BASE_WORDS,
    DATA_DIR,
    NEW_WORD,
    Example,
    answer,
    draw_letters,
    exact_match,
    make_example,
    make_tokenizer,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 0
STEPS = 1200
BATCH_SIZE = 64
PEAK_LR = 2e-3
WARMUP_STEPS = 100
REPORT_EVERY = 250
NEW_TRAIN, NEW_TEST, BASE_TEST = 2000, 500, 1000
WANTED_ACCURACY = 0.98


def write_jsonl(name: str, examples: list[Example]) -> None:
    """Write one data file, an example a line."""
    lines = (json.dumps(example) + "\n" for example in examples)
    (DATA_DIR / name).write_text("".join(lines), encoding="utf-8")


def write_data(rng: random.Random) -> tuple[list[Example], set[str]]:
    """Write the data; return the base's test and the strings kept out of training."""
    tests = list(islice(draw_letters(rng, set()), NEW_TEST + BASE_TEST))
    held_out = {"".join(letters) for letters in tests}
    new_test = [make_example(NEW_WORD, letters) for letters in tests[:NEW_TEST]]
    base_test = [
        make_example(BASE_WORDS[index % len(BASE_WORDS)], letters)
        for index, letters in enumerate(tests[NEW_TEST:])
    ]
    new_train = [
        make_example(NEW_WORD, letters)
        for letters in islice(draw_letters(rng, held_out), NEW_TRAIN)
    ]
    train_prompts = {example["instruction"] for example in new_train}
    assert train_prompts.isdisjoint(example["instruction"] for example in new_test)

    # With what axolotl prepared from older data, as it would not notice the change.
    shutil.rmtree(DATA_DIR, ignore_errors=True)
    DATA_DIR.mkdir()
    write_jsonl("train.jsonl", new_train)
    write_jsonl("test.jsonl", new_test)
    write_jsonl("base_test.jsonl", base_test)
    return base_test, held_out


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 0.87 million parameters with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=104,
            intermediate_size=320,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def make_batch(
    tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, right-padded; only the answer and EOS carry a label."""
    prompts = tokenizer([example["instruction"] for example in examples])["input_ids"]
    replies = tokenizer(
        [f"{example['output']} {tokenizer.eos_token}" for example in examples],
        add_special_tokens=False,
    )["input_ids"]
    width = max(len(p) + len(r) for p, r in zip(prompts, replies, strict=True))
    input_ids = torch.full((len(examples), width), tokenizer.pad_token_id)
    labels = torch.full((len(examples), width), -100)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        end = len(prompt) + len(reply)
        input_ids[row, :end] = torch.tensor(prompt + reply)
        labels[row, len(prompt) : end] = torch.tensor(reply)
    return input_ids, labels


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    held_out: set[str],
) -> None:
    """Train every weight on the base tasks, with fresh examples in each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=STEPS, pct_start=WARMUP_STEPS / STEPS
    )
    strings = draw_letters(rng, held_out)
    started = time.monotonic()
    model.train()
    for step in range(1, STEPS + 1):
        examples = [
            make_example(rng.choice(BASE_WORDS), letters)
            for letters in islice(strings, BATCH_SIZE)
        ]
        input_ids, labels = make_batch(tokenizer, examples)
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % REPORT_EVERY == 0:
            seconds = time.monotonic() - started
            print(
                f"step {step}/{STEPS}  loss {loss.item():.4f}  {seconds:.0f} s",
                flush=True,
            )


@torch.no_grad()
def place_new_word(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give the untrained word the mean embedding of the words that were trained.

    That is how a token is commonly added to a model. Left at its random start, the word
    would disturb the first layer, whose input no adapter on layer outputs can mend.
    """
    embeddings = model.get_input_embeddings().weight
    known = tokenizer.convert_tokens_to_ids(list(BASE_WORDS))
    new = tokenizer.convert_tokens_to_ids(NEW_WORD)
    embeddings[new] = embeddings[known].mean(dim=0)


def main() -> None:
    """Write data, tokenizer and a base model that is good at its own tasks."""
    torch.manual_seed(SEED)
    # A second thread would save a third of the time on an idle machine and cost several
    # times as much on a busy one, and the weights would depend on the thread count.
    torch.set_num_threads(1)
    rng = random.Random(SEED)
    base_test, held_out = write_data(rng)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print("Building a tiny base model from scratch, in 2 to 3 minutes:")
    print(f"{model.num_parameters():,} parameters, tasks: {', '.join(BASE_WORDS)}")
    print("loss: on those tasks; 0 is perfect", flush=True)
    train(model, tokenizer, rng, held_out)
    place_new_word(model, tokenizer)
    prompts = [example["instruction"] for example in base_test]
    accuracy = exact_match(answer(model, tokenizer, prompts), base_test)
    print(f"base tasks, held-out strings: {accuracy:.1%} exact match")
    model.save_pretrained(BASE_DIR)
    tokenizer.save_pretrained(BASE_DIR)
    if accuracy < WANTED_ACCURACY:
        raise SystemExit(f"the base is below {WANTED_ACCURACY:.0%}: do not build on it")


if __name__ == "__main__":
    main()
