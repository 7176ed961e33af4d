"""Run an adapter on prompts: which tokens it edits, and by how much.

Shapes: T tokens, L edited layers, N edited tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
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

from axolotl_reft.inspect.edit_size import edit_sizes
from axolotl_reft.inspect.facts import AdapterFacts
from axolotl_reft.inspect.tokens import ShownToken, edited_sides, shown_tokens
from axolotl_reft.saved.directory import check_adapter_fits, read_tensors
from axolotl_reft.tuner.walk import interventions_of

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
        return {
            "tokens": [
                {
                    "text": token.text,
                    "edited": token.edited,
                    "edit_size": sizes_L.tolist() if token.edited else None,
                }
                for token, sizes_L in zip(self.tokens, self.sizes_LT.T, strict=True)
            ]
        }


def open_base(facts: AdapterFacts, base_model: str | None) -> tuple[str, Any]:
    """Find the base model and the tokenizer, and check them before the model loads.

    Args:
        base_model: path or hub id; None takes the one that the adapter names.

    Returns:
        The base model's name, and the tokenizer saved beside the adapter or the base's.

    Raises:
        ValueError: there is no base model, it cannot be read, the adapter does not fit
            it, or is for a task other than causal language modelling or classification.
    """
    base_model = base_model or facts.settings.get("base_model_name_or_path")
    if not base_model:
        raise ValueError(
            "--base-model: the adapter does not name its base model; pass it"
        )
    task = _task(facts)
    if task not in ("CAUSAL_LM", "SEQ_CLS"):
        raise ValueError(
            f"DIR: the adapter is for {task}, and edits are measured for CAUSAL_LM and "
            "SEQ_CLS; leave out the prompts to see what its files say"
        )
    tokenizer = _adapter_tokenizer(facts.directory)
    try:
        config = AutoConfig.from_pretrained(base_model)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(base_model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--base-model: {base_model!r} cannot be read: "
            f"{str(error).splitlines()[0]}; pass the base model the adapter was "
            "trained on with --base-model"
        ) from error
    text = config.get_text_config()
    check_adapter_fits(facts.directory, "DIR", text.hidden_size, text.num_hidden_layers)
    return base_model, tokenizer


def _adapter_tokenizer(directory: str) -> Any:
    """Load the tokenizer saved beside the adapter, with the chat template of its
    training; None if there is no tokenizer."""
    try:
        if get_tokenizer_config(directory):
            return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"DIR: the tokenizer in {directory!r} cannot be read: "
            f"{str(error).splitlines()[0]}; save it again, or remove its files to "
            "take the base model's"
        ) from error
    return None


def load_model(facts: AdapterFacts, base_model: str, device: str = "cpu") -> PeftModel:
    """Load the base model with the adapter on it, in eval mode."""
    if _task(facts) == "SEQ_CLS":
        # A head's narrowest matrix has a row for each label.
        others = read_tensors(facts.directory, "DIR").others.values()
        labels = min((t.shape[0] for t in others if t.ndim == 2), default=2)
        model = AutoModelForSequenceClassification.from_pretrained(
            base_model, dtype="auto", num_labels=labels
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(base_model, dtype="auto")
    return PeftModel.from_pretrained(model, facts.directory).eval().to(device)


def _task(facts: AdapterFacts) -> str:
    return facts.settings.get("task_type") or "CAUSAL_LM"


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Tokenize a prompt.

    Args:
        chat: put it into the tokenizer's chat template, as a user's turn.

    Raises:
        ValueError: there is no chat template, or the prompt has no token.
    """
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("--chat: the tokenizer has no chat template; leave it out")
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError("--prompt: the prompt is empty; write some text")
    return ids


@torch.no_grad()
def probe(model: PeftModel, tokenizer: Any, ids: list[int]) -> ProbedPrompt:
    """Run one prompt and measure the edit of each token in each layer."""
    sizes: dict[tuple[int, int], Tensor] = {}
    sides: dict[str, list[bool]] = {}
    batch = torch.tensor([ids], device=model.device)
    real_BT = torch.ones_like(batch, dtype=torch.bool)

    def watch(layer: int, index: int, wrapper: Any, intervention: Any) -> Any:
        def measure(module: Any, args: Any, output: Tensor) -> None:
            sizes[layer, index] = edit_sizes(args[0], output).flatten().cpu()
            if not sides:
                spans = wrapper.prompts(_ADAPTER)
                masks = edited_sides(wrapper.specs[_ADAPTER].positions, spans, real_BT)
                sides.update((side, mask[0].tolist()) for side, mask in masks.items())

        return intervention.register_forward_hook(measure)

    handles = [watch(*found) for found in interventions_of(model, _ADAPTER)]
    try:
        model(input_ids=batch)
    finally:
        for handle in handles:
            handle.remove()
    tokens = shown_tokens(tokenizer, ids, sides, [True] * len(ids), trained=None)
    layers = sorted({layer for layer, _ in sizes})
    untied = any(side for _, side in sizes)
    sizes_LT = torch.full((len(layers), len(ids)), float("nan"))
    for (layer, side), sizes_N in sizes.items():
        own = (("prefix", "suffix")[side],) if untied else ("prefix", "suffix", "all")
        edited = [at for at, token in enumerate(tokens) if token.edited in own]
        # Reserved slots may follow those of the edited tokens.
        sizes_LT[layers.index(layer), edited] = sizes_N[: len(edited)]
    return ProbedPrompt(tokens, sizes_LT)


def add_sizes(facts: AdapterFacts, probed: list[ProbedPrompt]) -> None:
    """Add the means over prompts and tokens to the facts, by layer and side."""
    for number, layer in enumerate(facts.layers):
        for side in ("prefix", "suffix", "all"):
            values = [
                prompt.sizes_LT[number, place]
                for prompt in probed
                for place, token in enumerate(prompt.tokens)
                if token.edited == side
            ]
            if values:
                layer.edit_size[side] = float(torch.nanmean(torch.stack(values)))
