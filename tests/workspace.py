"""A tiny model, tokenizer, data set and config on disk, for tests of the commands."""

import json
import random
import string
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
ANSWER = "m"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Letters as words; a beginning token before every text."""
    words = [*SPECIALS, *string.ascii_lowercase, ":"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def build_base(
    directory: Path, hidden_size: int = 64, layers: int = 3, mlp: int = 48
) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def build_data(file: Path, count: int, seed: int) -> None:
    """Prompts of ragged length that all want the same answer."""
    random.seed(seed)
    with file.open("w") as out:
        for _ in range(count):
            letters = random.sample(string.ascii_lowercase[:12], random.randint(2, 8))
            prompt = " ".join(letters) + " :"
            out.write(json.dumps({"instruction": prompt, "output": ANSWER}) + "\n")


def build_config(directory: Path, name: str = "config.yml", **changes: object) -> Path:
    """A config in ``directory``, whose base and data are beside it."""
    prompt_format = {
        "field_instruction": "instruction",
        "field_output": "output",
        "format": "{instruction}",
        "no_input_format": "{instruction}",
    }

    def data(name: str) -> list[dict[str, object]]:
        path = str(directory / name)
        source = {"path": path, "ds_type": "json", "type": prompt_format}
        return [source | {"split": "train"}]

    settings: dict[str, object] = {
        "base_model": str(directory / "base"),
        "plugins": ["axolotl_reft.LoreftPlugin"],
        "adapter": "loreft",
        "loreft": {"positions": "f2+l2", "rank": 4, "tied_weights": False},
        "datasets": data("train.jsonl"),
        "test_datasets": data("test.jsonl"),
        "dataset_prepared_path": str(directory / "prepared"),
        "output_dir": str(directory / "out"),
        "sequence_len": 32,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_epochs": 6,
        "learning_rate": 0.02,
        "lr_scheduler": "cosine",
        "optimizer": "adamw_torch",
        "weight_decay": 0.01,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "eager",
        "logging_steps": 1,
        "save_steps": 24,
        "seed": 7,
    }
    path = directory / name
    path.write_text(yaml.safe_dump(settings | changes))
    return path


def build_reward_workspace(directory: Path) -> Path:
    """A base and pairs of answers, of which the alphabetical one is chosen."""
    build_base(directory / "base")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "base")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }} : {% endfor %}"
    )
    tokenizer.save_pretrained(directory / "base")
    random.seed(0)
    with (directory / "train.jsonl").open("w") as out:
        for _ in range(64):
            prompt = " ".join(random.sample("abcdefgh", random.randint(2, 6)))
            pair = {"chosen": "m n", "rejected": "n m"}
            out.write(json.dumps({"system": "", "input": prompt, **pair}) + "\n")
    path = str(directory / "train.jsonl")
    source = {"path": path, "ds_type": "json", "type": "bradley_terry.chat_template"}
    return build_config(
        directory,
        reward_model=True,
        datasets=[source],
        test_datasets=None,
        chat_template="tokenizer_default",
        remove_unused_columns=False,
        num_epochs=2,
        save_steps=1000,
    )


def build_workspace(directory: Path, mlp: int = 48) -> Path:
    """Everything; returns the config.

    On CPUs with bfloat16, bitsandbytes takes an ``mlp`` of a multiple of 32 alone.
    """
    build_base(directory / "base", mlp=mlp)
    build_data(directory / "train.jsonl", 64, seed=0)
    build_data(directory / "test.jsonl", 16, seed=1)
    return build_config(directory)


def build_task(
    directory: Path, output_type: str = "multiple_choice"
) -> list[dict[str, object]]:
    """A task ``letters`` of lm_eval: four questions, three choices each."""
    directory.mkdir(exist_ok=True)
    rows = [
        {"text": text, "choices": ["m n", "n", "q r s"], "right": index % 3}
        for index, text in enumerate(["a b c d :", "e f :", "g h i j k :", "l a :"])
    ]
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {
        "multiple_choice": {
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{right}}",
            "metric_list": [{"metric": "acc"}],
        },
        "loglikelihood_rolling": {
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }[output_type]
    task = asked | {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": output_type,
    }
    (directory / "letters.yaml").write_text(json.dumps(task))
    return rows
