"""The section on LoReFT in an adapter's model card (its ``README.md``).

PEFT writes a card wherever it saves an adapter, and trainers write over it; each time
the section is put into what they left.
"""

from __future__ import annotations

import re
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel

from axolotl_reft.config import LoreftConfig
from axolotl_reft.peft_type import LOREFT

_BEGIN, _END = "<!-- LoReFT: begin -->", "<!-- LoReFT: end -->"
_TAGS = ("loreft", "reft")
_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
}
_WRAPPED = "_loreft_section"


def section(config: LoreftConfig, name: str | None = None) -> str:
    """What a card says of an adapter.

    Args:
        name: hub id of the adapter, where it is known.
    """
    loader = _CLASSES.get(str(getattr(config.task_type, "value", config.task_type)))
    loader = loader or "AutoPeftModel"
    name = name or "path/or/hub-id/of/this/adapter"
    tied = (
        "" if "+" not in config.positions else f", tied_weights {config.tied_weights}"
    )
    return f"""{_BEGIN}
## LoReFT adapter

A [LoReFT](https://arxiv.org/abs/2404.03592) adapter for PEFT. It leaves the weights of
the base model alone and edits hidden states at positions `{config.positions}`
({_in_words(config.positions)}), so it cannot be merged.

- intervention `{config.intervention}`, rank {_plain(config.rank)}{tied}
- layers `{_plain(config.layers)}`, component `{config.component}`

Load it, with `axolotl-reft` installed:

```python
import axolotl_reft  # makes LoReFT a PEFT method
from peft import {loader}
model = {loader}.from_pretrained("{name}")
```
{_END}"""


def add_section(directory: str, config: LoreftConfig, name: str | None = None) -> None:
    """Put the section into the card in ``directory``; again replaces it."""
    file = Path(directory) / "README.md"
    if not file.is_file():
        return
    card = ModelCard.load(file)
    card.data["tags"] = sorted({*(card.data.tags or []), *_TAGS})
    text = re.sub(f"{_BEGIN}.*?{_END}\n*", "", card.text, flags=re.DOTALL)
    heading = re.search(r"^## ", text, re.MULTILINE)
    at = heading.start() if heading else len(text)
    before, after = text[:at].rstrip(), text[at:].lstrip()
    card.text = f"{before}\n\n{section(config, name)}\n\n{after}"
    card.save(file)


def extend_pefts_cards() -> None:
    """Have PEFT's cards of LoReFT adapters hold the section; again is harmless.

    PEFT has no hook for this, and transformers' Trainer, when it has written a card of
    its own, calls this very method to have the adapter's part put in.
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

    trainer.create_model_card = write_with_section


def _in_words(positions: str) -> str:
    if positions == "all":
        return "every token, generated ones too"
    sides = []
    for part in positions.split("+"):
        which = "first" if part.startswith("f") else "last"
        sides.append(f"the {which} {part[1:]}")
    return " and ".join(sides) + " tokens of a prompt"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{rank} in layers {key}" for key, rank in value.items())
    return str(value)
