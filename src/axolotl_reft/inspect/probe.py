"""Run an adapter on prompts: which tokens it edits, and by how much.

Shapes: B batch, T tokens, L edited layers, N edited tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from axolotl_reft.core.interventions import edit_sizes
from axolotl_reft.inspect.facts import AdapterFacts
from axolotl_reft.inspect.tokens import SIDES, ShownToken, edited_sides, token_text
from axolotl_reft.saved.directory import check_adapter_fits, read_tensors
from axolotl_reft.tuner.layer import FoundIntervention, interventions_of

_ADAPTER = "default"


@dataclass
class ProbedPrompt:
    """The edits of one prompt.

    Attributes:
        tokens: T of them.
        sizes_LT: ‖Φ(h)−h‖/‖h‖; NaN where a token is not edited.
    """

    tokens: list[ShownToken]
    sizes_LT: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: sizes by token, None where it is not edited."""
        tokens = []
        for token, sizes_L in zip(self.tokens, self.sizes_LT.T, strict=True):
            sizes = sizes_L.tolist() if token.edited else None
            tokens.append(
                {"text": token.text, "edited": token.edited, "edit_size": sizes}
            )
        return {"tokens": tokens}


def resolve_base(facts: AdapterFacts, base_model: str | None) -> tuple[str, Any]:
    """Return the base model's name, by default the one that the adapter names, and the
    tokenizer; ValueError, before the model loads, if it cannot be read, or the adapter
    does not fit it or is for another task than a causal model's or classification."""
    base_model = base_model or facts.settings.get("base_model_name_or_path")
    if not base_model:
        raise ValueError("--base-model: the adapter names none; pass its base model")
    task = facts.settings.get("task_type", "CAUSAL_LM")
    if task not in ("CAUSAL_LM", "SEQ_CLS"):
        raise ValueError(
            f"DIR: the adapter is for {task}, and edits are measured for CAUSAL_LM and "
            "SEQ_CLS; leave out the prompts"
        )
    setting, source = "--base-model", base_model
    try:
        config = AutoConfig.from_pretrained(base_model).get_text_config()
        setting, source = "DIR", facts.directory
        if not get_tokenizer_config(source):
            setting, source = "--base-model", base_model
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{setting}: the model or tokenizer {source!r} cannot be read: {reason}; "
            "save it again, or pass another --base-model"
        ) from error
    size, layers = config.hidden_size, config.num_hidden_layers
    check_adapter_fits(facts.directory, "DIR", size, layers)
    return base_model, tokenizer


def load_model(facts: AdapterFacts, base_model: str, device: str = "cpu") -> PeftModel:
    """Load the base model with the adapter on it, in eval mode."""
    auto_class, settings = AutoModelForCausalLM, {}
    if facts.settings.get("task_type") == "SEQ_CLS":
        auto_class = AutoModelForSequenceClassification
        # A head's narrowest matrix has a row for each label.
        others = read_tensors(facts.directory, "DIR").others.values()
        rows = [tensor.shape[0] for tensor in others if tensor.ndim == 2]
        settings = {"num_labels": min(rows, default=2)}
    model = auto_class.from_pretrained(base_model, dtype="auto", **settings)
    return PeftModel.from_pretrained(model, facts.directory).eval().to(device)


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Tokenize a prompt, as a user's turn in the chat template with ``chat``;
    ValueError if there is no template, or no token."""
    if chat and not tokenizer.chat_template:
        raise ValueError("--chat: the tokenizer has no chat template; leave it out")
    if chat:
        turns = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    else:
        encoded = tokenizer(prompt)
    if not encoded["input_ids"]:
        raise ValueError("--prompt: the prompt is empty; write some text")
    return encoded["input_ids"]


@torch.no_grad()
def probe(model: PeftModel, tokenizer: Any, ids: list[int]) -> ProbedPrompt:
    """Run one prompt and measure the edit of each token in each layer."""
    places = list(interventions_of(model, _ADAPTER))
    layers = sorted({place.layer for place in places})
    untied = any(place.side for place in places)
    ids_BT = torch.tensor([ids], device=model.device)
    sides_T = torch.zeros(len(ids), dtype=torch.long)
    sizes_LT = torch.full((len(layers), len(ids)), torch.nan)

    def measure(place: FoundIntervention, before: Tensor, after: Tensor) -> None:
        layer = place.wrapper
        positions, spans = layer.specs[_ADAPTER].positions, layer.prompts(_ADAPTER)
        sides_T.copy_(edited_sides(positions, spans, torch.ones_like(ids_BT))[0])
        edited_T = sides_T == place.side + 1 if untied else sides_T > 0
        # Reserved slots may follow those of the edited tokens.
        sizes_N = edit_sizes(before, after).flatten()[: int(edited_T.sum())]
        sizes_LT[layers.index(place.layer), edited_T] = sizes_N.cpu()

    for place in places:
        place.intervention.on_edit = partial(measure, place)
    try:
        model(input_ids=ids_BT)
    finally:
        for place in places:
            place.intervention.on_edit = None
    tokens = [
        ShownToken(token_text(tokenizer, token), SIDES[side])
        for token, side in zip(ids, sides_T.tolist(), strict=True)
    ]
    return ProbedPrompt(tokens, sizes_LT)


def add_sizes(facts: AdapterFacts, probed: list[ProbedPrompt]) -> None:
    """Add the means over prompts and tokens to the facts, by layer and side."""
    for side in filter(None, SIDES):
        sizes = [
            prompt.sizes_LT[:, [token.edited == side for token in prompt.tokens]]
            for prompt in probed
        ]
        sizes_LN = torch.cat(sizes, 1)
        if sizes_LN.shape[1]:
            means = sizes_LN.nanmean(1).tolist()
            for layer, mean in zip(facts.layers, means, strict=True):
                layer.edit_size[side] = mean
