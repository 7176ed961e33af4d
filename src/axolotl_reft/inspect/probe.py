"""An adapter at work on prompts: which tokens it edits, and by how much.

Shapes: T tokens, L edited layers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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

from axolotl_reft.inspect.edit_size import edit_sizes, named_interventions, nan_mean
from axolotl_reft.inspect.facts import AdapterFacts
from axolotl_reft.inspect.tokens import ShownToken, edited_sides, shown_tokens
from axolotl_reft.saved.directory import check_adapter_fits
from axolotl_reft.saved.directory import read_tensors as read_numbers

_ADAPTER = "default"


@dataclass
class ProbedPrompt:
    """One prompt as the adapter edits it.

    Attributes:
        tokens: T of them.
        sizes_LT: ‖Φ(h)−h‖/‖h‖; NaN where a token is not edited.
    """

    tokens: list[ShownToken]
    sizes_LT: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: sizes by token, None where it is not edited."""
        sizes = [
            None if token.edited is None else self.sizes_LT[:, place].tolist()
            for place, token in enumerate(self.tokens)
        ]
        return {
            "tokens": [
                {"text": token.text, "edited": token.edited, "edit_size": size}
                for token, size in zip(self.tokens, sizes, strict=True)
            ]
        }


def read_prompts(path: str, sample: int | None = None, seed: int = 0) -> list[str]:
    """Prompts of a file, one a line; JSON lines hold a string, or one as ``prompt``.

    Args:
        sample: how many to draw; None takes all.

    Raises:
        ValueError: the file cannot be read, is empty, or a line holds no prompt.
    """
    try:
        lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts-file: {path!r} cannot be read: {error}") from error
    if not lines:
        raise ValueError(f"--prompts-file: {path!r} is empty; write one prompt a line")
    if sample and sample < len(lines):
        lines = random.Random(seed).sample(lines, sample)
    return [_prompt(line, path) for line in lines]


def _prompt(line: str, path: str) -> str:
    if line.lstrip()[0] not in '{"':
        return line
    try:
        read = json.loads(line)
    except ValueError:
        return line
    if isinstance(read, dict):
        read = read.get("prompt", read.get("instruction"))
    if not isinstance(read, str):
        raise ValueError(
            f"--prompts-file: {path!r} has a line without a prompt: {line[:60]!r}; "
            'write plain text, or JSON such as {"prompt": "…"}'
        )
    return read


def open_base(facts: AdapterFacts, base_model: str | None) -> tuple[str, Any]:
    """The base model's name, and the adapter's tokenizer where one is saved beside it,
    or the base's; everything is checked before the model loads.

    Args:
        facts: of the adapter.
        base_model: path or hub id; None takes the one that the adapter names.

    Raises:
        ValueError: there is none, it cannot be read, the adapter does not fit it, or
            is of a task other than causal language modelling or classification.
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
    tokenizer = _own_tokenizer(facts.directory)
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


def _own_tokenizer(directory: str) -> Any:
    """The one saved beside an adapter, with the chat template of its training."""
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
    """The base model with the adapter on it, ready to answer."""
    if _task(facts) == "SEQ_CLS":
        model = AutoModelForSequenceClassification.from_pretrained(
            base_model, dtype="auto", num_labels=_labels(facts.directory)
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(base_model, dtype="auto")
    return PeftModel.from_pretrained(model, facts.directory).eval().to(device)


def _task(facts: AdapterFacts) -> str:
    return facts.settings.get("task_type") or "CAUSAL_LM"


def _labels(directory: str) -> int:
    """Of a classifier, from the narrowest matrix of its saved head."""
    heads = [t for t in read_numbers(directory, "DIR").others.values() if t.ndim == 2]
    return min((head.shape[0] for head in heads), default=2)


@torch.no_grad()
def sampled_prompts(
    model: PeftModel, tokenizer: Any, count: int, tokens: int = 32, seed: int = 0
) -> list[list[int]]:
    """Texts that the base model itself writes, as ids: what it holds for likely."""
    torch.manual_seed(seed)
    start = tokenizer.bos_token_id
    vocabulary = model.get_base_model().config.get_text_config().vocab_size
    first = (
        torch.randint(vocabulary, (count, 1))
        if start is None
        else torch.full((count, 1), start)
    ).to(model.device)
    ids_BT = first
    with model.disable_adapter():
        for _ in range(tokens - 1):
            logits = model(input_ids=ids_BT).logits[:, -1].float()
            drawn = torch.multinomial(logits.softmax(-1), 1)
            ids_BT = torch.cat([ids_BT, drawn], 1)
    return ids_BT.tolist()


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """A prompt's tokens.

    Args:
        chat: whether to put it into the tokenizer's chat template, as a user's turn.

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
    """Run one prompt, and note what is edited and by how much."""
    found: dict[tuple[int, int], Tensor] = {}
    seen: dict[str, Tensor] = {}
    batch = torch.tensor([ids], device=model.device)
    with _watched(model, found, seen, torch.ones_like(batch, dtype=torch.bool)):
        model(input_ids=batch)
    layers = sorted({layer for layer, _ in found})
    sizes_LT = torch.full((len(layers), len(ids)), float("nan"))
    untied = any(side for _, side in found)
    for (layer, side), sizes_N in found.items():
        if untied:
            mask_T = seen[("prefix", "suffix")[side]][0]
        else:
            mask_T = torch.stack([mask[0] for mask in seen.values()]).any(0)
        places = mask_T.nonzero().squeeze(1)
        row = sizes_LT[layers.index(layer)]
        row[places] = sizes_N.flatten()[: len(places)].cpu()
    tokens = shown_tokens(
        tokenizer,
        ids,
        {side: mask[0].tolist() for side, mask in seen.items()},
        inside=[True] * len(ids),
        trained=None,
    )
    return ProbedPrompt(tokens, sizes_LT)


@contextmanager
def _watched(
    model: PeftModel,
    found: dict[tuple[int, int], Tensor],
    seen: dict[str, Tensor],
    real_BT: Tensor,
) -> Iterator[None]:
    """Fill ``found`` with sizes by layer and side, ``seen`` with masks by side."""
    handles = []
    for layer, side, wrapper, intervention in named_interventions(model, _ADAPTER):

        def note(
            module: Any,
            args: Any,
            output: Tensor,
            place: tuple[int, int] = (layer, side),
            wrapper: Any = wrapper,
        ) -> None:
            found[place] = edit_sizes(args[0], output)
            if not seen:
                positions = wrapper.specs[_ADAPTER].positions
                prompts = wrapper.prompts(_ADAPTER)
                seen.update(edited_sides(positions, prompts, real_BT))

        handles.append(intervention.register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_sizes(facts: AdapterFacts, probed: list[ProbedPrompt]) -> None:
    """Put the means over prompts and tokens into the facts, by layer and side."""
    for number, layer in enumerate(facts.layers):
        for side in ("prefix", "suffix", "all"):
            values = [
                prompt.sizes_LT[number, place]
                for prompt in probed
                for place, token in enumerate(prompt.tokens)
                if token.edited == side
            ]
            if values:
                layer.edit_size[side] = nan_mean(torch.stack(values))
