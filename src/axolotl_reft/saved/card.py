"""Puts a section on LoReFT into the model cards that PEFT and trainers write."""

from __future__ import annotations

import re
from functools import cache, wraps
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel

from axolotl_reft.prompts.positions import Positions
from axolotl_reft.settings.components import component_layer
from axolotl_reft.tuner.config import LOREFT, LoreftConfig
from axolotl_reft.tuner.trained_modules import HEADS

_BEGIN, _END = "<!-- LoReFT: begin -->", "<!-- LoReFT: end -->"
_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
}
_PROMPT = 'inputs = tokenizer("A prompt, as in training", return_tensors="pt")'
_CHAT = """chat = [{"role": "user", "content": "A question"}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
# Of an adapter on a base that is a local path, transformers writes that it was trained
# from scratch, and TRL that it is fine-tuned from None.
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
    positions = Positions.parse(config.positions)
    rank: object = config.rank
    if isinstance(rank, dict):
        rank = ", ".join(f"{r} in layers {at}" for at, r in rank.items())
    tied = f", tied_weights {config.tied_weights}" if positions.two_sided else ""
    named = component_layer(config.component)
    layers = f"layers `{config.layers}`, " if named is None else ""
    lora = ""
    if config.lora is not None:
        targets = config.lora["target_modules"]
        targets = targets if isinstance(targets, str) else ", ".join(targets)
        lora = (
            "- with LoRA beside it in all layers, on every token: r "
            f"{config.lora['r']}, target_modules `{targets}`\n"
        )
    form = "the same prompt template."
    if config.turn_markers is not None:
        turn = "each turn's" if config.turns == "every" else "the first turn's"
        form = f"the chat template, by whose marks\n{turn} prompt is found and edited."
    return f"""{_BEGIN}
## LoReFT adapter

A [LoReFT](https://arxiv.org/abs/2404.03592) adapter for PEFT. It edits hidden states,
so it cannot be merged. Edited are positions `{config.positions}`:
{_in_words(positions)}.

- intervention `{config.intervention}`, rank {rank}{tied}
- {layers}component `{config.component}`
- the base model's weights are {_frozen(config)}
{lora}
A prompt must have the form that it had in training: {form}

Load it, with `axolotl-reft` installed:

```python
{_code(config, name or "path/or/hub-id/of/this/adapter", own_tokenizer)}
```
{_END}"""


def add_section(directory: str, config: LoreftConfig, name: str | None = None) -> None:
    """Put the section into the card in ``directory``, or replace it there.

    Args:
        name: hub id of the adapter, where it is known.
    """
    file = Path(directory) / "README.md"
    if not file.is_file():
        return
    card = ModelCard.load(file)
    card.data["tags"] = sorted({*(card.data.tags or []), "loreft", "reft"})
    text = re.sub(f"{_BEGIN}.*?{_END}\n*", "", card.text, flags=re.DOTALL)
    trained = rf"trained\g<data> with the base model's weights {_frozen(config)}"
    text = _OF_NO_BASE.sub(f"This is an adapter, {trained}.", text)
    own_tokenizer = (file.parent / "tokenizer_config.json").is_file()
    described = section(config, name, own_tokenizer)
    before, *after = re.split(r"^(?=## )", text, maxsplit=1, flags=re.MULTILINE)
    card.text = f"{before.rstrip()}\n\n{described}\n\n{''.join(after).lstrip()}"
    card.save(file)


@cache
def extend_pefts_cards() -> None:
    """Patch PEFT to add the section to cards of LoReFT adapters; again is harmless.

    transformers' Trainer calls the patched method too.
    """
    write = PeftModel.create_or_update_model_card

    @wraps(write)
    def write_with_section(self: PeftModel, output_dir: str) -> None:
        write(self, output_dir)
        config = self.active_peft_config
        if config.peft_type == LOREFT:
            add_section(output_dir, config)

    # Patch: PEFT has no hook for the cards of other methods.
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


def _in_words(positions: Positions) -> str:
    if positions.everywhere:
        return "every token, generated ones too"
    counts = {"first": positions.first, "last": positions.last}
    sides = [
        f"the {which} " + ("token" if count == 1 else f"{count} tokens")
        for which, count in counts.items()
        if count
    ]
    each = " each" if positions.two_sided else ""
    return f"{' and '.join(sides)} of a prompt, at most half of a prompt{each}"


def _frozen(config: LoreftConfig) -> str:
    named = set(config.modules_to_save or ())
    whole = [f"`{name}`" for name in sorted(named.difference(HEADS))]
    if named.intersection(HEADS):
        whole.append("the classifier's head")
    if not whole:
        return "frozen"
    listed = " and ".join(filter(None, (", ".join(whole[:-1]), whole[-1])))
    return f"frozen, but for {listed}, trained whole and saved with the adapter"


def _code(config: LoreftConfig, name: str, own_tokenizer: bool) -> str:
    """Write Python that loads an adapter and, of a causal LM, generates."""
    task = str(getattr(config.task_type, "value", config.task_type))
    loader = _CLASSES.get(task, "AutoPeftModel")
    imports = (
        "import axolotl_reft  # makes LoReFT a PEFT method\n"
        f"from peft import {loader}\n"
    )
    load = f'model = {loader}.from_pretrained("{name}")'
    if task != "CAUSAL_LM":
        return imports + load
    base = config.base_model_name_or_path or "path/or/hub-id/of/the/base"
    return f"""{imports}from transformers import AutoTokenizer

{load}
tokenizer = AutoTokenizer.from_pretrained("{name if own_tokenizer else base}")
{_PROMPT if config.turn_markers is None else _CHAT}
output = model.generate(**inputs, max_new_tokens=100)[0]
answer = output[inputs.input_ids.shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
