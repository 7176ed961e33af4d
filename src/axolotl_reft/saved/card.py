"""Puts a section on LoReFT into the model cards that PEFT and trainers write."""

from __future__ import annotations

import re
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel

from axolotl_reft.settings.components import component_layer
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.peft_type import LOREFT
from axolotl_reft.tuner.trained_modules import HEADS

_BEGIN, _END = "<!-- LoReFT: begin -->", "<!-- LoReFT: end -->"
_TAGS = ("loreft", "reft")
_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
}
_WRAPPED = "_loreft_section"
_NAME, _BASE = "path/or/hub-id/of/this/adapter", "path/or/hub-id/of/the/base"
_OF_NO_BASE = re.compile(
    r"^This model (?:was trained from scratch|is a fine-tuned version of "
    r"\[None\]\(https://huggingface\.co/None\))(?P<data> on .*)?\.$",
    re.MULTILINE,
)


def section(
    config: LoreftConfig, name: str | None = None, own_tokenizer: bool = False
) -> str:
    """Describe an adapter.

    Args:
        name: hub id of the adapter, where it is known.
        own_tokenizer: whether a tokenizer is saved beside it.
    """
    tied = f", tied_weights {config.tied_weights}" if "+" in config.positions else ""
    layers = f"layers `{config.layers}`, "
    if component_layer(config.component) is not None:
        layers = ""
    rank: object = config.rank
    if isinstance(rank, dict):
        rank = ", ".join(f"{r} in layers {at}" for at, r in rank.items())
    return f"""{_BEGIN}
## LoReFT adapter

A [LoReFT](https://arxiv.org/abs/2404.03592) adapter for PEFT. It edits hidden states,
so it cannot be merged. Edited are positions `{config.positions}`:
{_in_words(config.positions)}.

- intervention `{config.intervention}`, rank {rank}{tied}
- {layers}component `{config.component}`
- the base model's weights are {_frozen(config)}
{_lora(config)}
{_form(config)}

Load it, with `axolotl-reft` installed:

```python
{_code(config, name or _NAME, own_tokenizer)}
```
{_END}"""


def add_section(directory: str, config: LoreftConfig, name: str | None = None) -> None:
    """Put the section into the card in ``directory``, or replace it there.

    Of an adapter on a base that is a local path, transformers writes that it was
    trained from scratch, and TRL that it is fine-tuned from ``None``.
    """
    file = Path(directory) / "README.md"
    if not file.is_file():
        return
    card = ModelCard.load(file)
    card.data["tags"] = sorted({*(card.data.tags or []), *_TAGS})
    text = re.sub(f"{_BEGIN}.*?{_END}\n*", "", card.text, flags=re.DOTALL)
    text = _OF_NO_BASE.sub(
        lambda match: (
            f"This is an adapter, trained{match['data'] or ''} with the "
            f"base model's weights {_frozen(config)}."
        ),
        text,
    )
    heading = re.search(r"^## ", text, re.MULTILINE)
    at = heading.start() if heading else len(text)
    before, after = text[:at].rstrip(), text[at:].lstrip()
    own_tokenizer = (file.parent / "tokenizer_config.json").is_file()
    card.text = f"{before}\n\n{section(config, name, own_tokenizer)}\n\n{after}"
    card.save(file)


def extend_pefts_cards() -> None:
    """Patch PEFT to add the section to cards of LoReFT adapters; again is harmless.

    PEFT has no hook for this, and transformers' Trainer calls this method too.
    """
    write = PeftModel.create_or_update_model_card
    if hasattr(write, _WRAPPED):
        return

    @wraps(write)
    def write_with_section(self: PeftModel, output_dir: str) -> None:
        write(self, output_dir)
        config = self.active_peft_config
        if config.peft_type == LOREFT:
            add_section(output_dir, config)

    # Patch: PEFT has no hook for the cards of other methods.
    setattr(write_with_section, _WRAPPED, True)
    PeftModel.create_or_update_model_card = write_with_section


def keep_in_trainers_card(trainer: Any, config: LoreftConfig) -> None:
    """Add the section to whatever card a trainer writes, TRL's included."""
    write = trainer.create_model_card

    @wraps(write)
    def write_with_section(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        if trainer.is_world_process_zero():
            add_section(trainer.args.output_dir, config, trainer.args.hub_model_id)

    # Patch: a trainer writes its card over PEFT's.
    trainer.create_model_card = write_with_section


def _in_words(positions: str) -> str:
    if positions == "all":
        return "every token, generated ones too"
    sides = []
    for part in positions.split("+"):
        which, count = "first" if part.startswith("f") else "last", part[1:]
        sides.append(f"the {which} " + ("token" if count == "1" else f"{count} tokens"))
    each = " each" if len(sides) == 2 else ""
    return f"{' and '.join(sides)} of a prompt, at most half of a prompt{each}"


def _frozen(config: LoreftConfig) -> str:
    named = sorted(set(config.modules_to_save or ()))
    whole = [f"`{name}`" for name in named if name not in HEADS]
    if len(whole) < len(named):
        whole.append("the classifier's head")
    if not whole:
        return "frozen"
    listed = " and ".join(filter(None, (", ".join(whole[:-1]), whole[-1])))
    return f"frozen, but for {listed}, trained whole and saved with the adapter"


def _lora(config: LoreftConfig) -> str:
    if config.lora is None:
        return ""
    targets = config.lora["target_modules"]
    targets = targets if isinstance(targets, str) else ", ".join(targets)
    return (
        f"- with LoRA beside it in all layers, on every token: r {config.lora['r']}, "
        f"target_modules `{targets}`\n"
    )


def _form(config: LoreftConfig) -> str:
    form = "A prompt must have the form that it had in training:"
    if config.turn_markers is None:
        return f"{form} the same prompt template."
    turn = "each turn's" if config.turns == "every" else "the first turn's"
    return (
        f"{form} the chat template, by whose marks\n{turn} prompt is found and edited."
    )


def _code(config: LoreftConfig, name: str, own_tokenizer: bool) -> str:
    """Write Python that loads an adapter and, of a causal LM, generates."""
    task = str(getattr(config.task_type, "value", config.task_type))
    loader = _CLASSES.get(task, "AutoPeftModel")
    lines = [
        "import axolotl_reft  # makes LoReFT a PEFT method",
        f"from peft import {loader}",
        f'model = {loader}.from_pretrained("{name}")',
    ]
    if task != "CAUSAL_LM":
        return "\n".join(lines)
    tokenizer = name if own_tokenizer else config.base_model_name_or_path or _BASE
    lines.insert(2, "from transformers import AutoTokenizer\n")
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")')
    if config.turn_markers is None:
        prompt = '"A prompt, as in training", return_tensors="pt"'
        lines.append(f"inputs = tokenizer({prompt})")
    else:
        lines += [
            'chat = [{"role": "user", "content": "A question"}]',
            "inputs = tokenizer.apply_chat_template(",
            "    chat, add_generation_prompt=True, return_dict=True, "
            'return_tensors="pt"',
            ")",
        ]
    lines += [
        "output = model.generate(**inputs, max_new_tokens=100)[0]",
        "answer = output[inputs.input_ids.shape[1] :]",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
    return "\n".join(lines)
