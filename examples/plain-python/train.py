"""LoReFT without axolotl: transformers' Trainer or TRL's SFTTrainer, and PEFT.

    python examples/plain-python/train.py                  # a tiny model, on any CPU
    python examples/plain-python/train.py --trainer trl
    python examples/plain-python/train.py --model meta-llama/Llama-3.2-1B

Without --model it builds a random Llama of 3 layers and its tokenizer, so nothing is
fetched, and keeps it beside the adapter, in OUTPUT-base; it prints the loss and an
answer before and after. A real model wants data of your own in the place of
`examples()`, and a GPU.
"""

import argparse
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

import axolotl_reft

FRUITS = "apple pear plum cherry grape lemon peach mango".split()
ANIMALS = "cat dog horse cow goat sheep duck mouse".split()


def examples():
    """Prompts and the answers to learn."""
    for kind, names in (("fruit", FRUITS), ("animal", ANIMALS)):
        for name in names:
            yield {"prompt": f"what is a {name} ?", "completion": f" {kind}"}


def build_tiny_model(directory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *"what is a ? fruit animal".split()]
    words += FRUITS + ANIMALS
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def tokenized(tokenizer):
    """Ids and labels; −100 marks the prompt, which is how LoReFT finds it."""
    for example in examples():
        prompt = tokenizer(example["prompt"])["input_ids"]
        answer = tokenizer(example["completion"], add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        yield {
            "input_ids": prompt + answer,
            "attention_mask": [1] * len(prompt + answer),
            "labels": [-100] * len(prompt) + answer,
        }


def train_with_transformers(base, tokenizer, config, settings):
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    trainer = Trainer(
        model,
        TrainingArguments(**settings),
        train_dataset=list(tokenized(tokenizer)),
        data_collator=collator(model, tokenizer),
    )
    return trainer


def collator(model, tokenizer):
    collate = DataCollatorForSeq2Seq(tokenizer)
    # Counts prompts on the host, so that it need not wait for a GPU at each step.
    collate = axolotl_reft.PromptCounter.of(model, collate)
    # Has the model compute no logits but those that the loss is computed from.
    return axolotl_reft.LabelledLogits.of(model, collate)


def train_with_trl(base, tokenizer, config, settings):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    # Columns "prompt" and "completion": TRL trains on the completion alone, so the
    # labels of the prompt are −100.
    return SFTTrainer(
        base,
        SFTConfig(**settings),
        train_dataset=Dataset.from_list(list(examples())),
        processing_class=tokenizer,
        peft_config=config,
    )


def answer(model, tokenizer, prompt):
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 2, "do_sample": False, "return_full_text": False}
    return generate(prompt, **settings)[0]["generated_text"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--trainer", choices=["transformers", "trl"], default="transformers"
    )
    parser.add_argument(
        "--model", help="path or hub id; default: a tiny one, made here"
    )
    parser.add_argument("--output", default="outputs/plain-python")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    set_seed(0)
    name = arguments.model
    if name is None:
        # The adapter says where its base is, so that must stay where it is.
        name = f"{arguments.output}-base"
        build_tiny_model(name)
    base = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(name)
    prompt = "what is a horse ?"
    print("prompt:", prompt)
    print("before:", answer(base, tokenizer, prompt))
    if arguments.model is None:
        print("(from a random model, so any answer before is chance)")

    config = axolotl_reft.LoreftConfig(
        task_type="CAUSAL_LM", positions="f2+l2", rank=4, tied_weights=False
    )
    settings = {
        "output_dir": arguments.output,
        "max_steps": arguments.steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 9e-4 if arguments.model else 2e-2,
        "logging_steps": 25,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
    }
    make = train_with_trl if arguments.trainer == "trl" else train_with_transformers
    trainer = make(base, tokenizer, config, settings)
    trainer.train()
    trainer.save_model(arguments.output)

    trained = AutoPeftModelForCausalLM.from_pretrained(arguments.output)
    print("after:", answer(trained, tokenizer, prompt))
    print("base:", name)
    print("saved:", *sorted(file.name for file in Path(arguments.output).iterdir()))


if __name__ == "__main__":
    main()
