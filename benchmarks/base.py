"""The base model that all contestants share, and the batches they are given.

Runs in the contestants' own environments too: torch and transformers alone.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Setting:
    """What is built and what it is given; the defaults make a small one.

    Attributes:
        edited: ``all`` decoder layers, the ``upper`` half of them, or the ``last``.
        prompt: tokens of the prompt; the rest of ``length`` is the answer.
        shared: first tokens of the prompt that are the same in all samples.
        samples: for ragged batches, how many samples; 0 for a full rectangle.
        base: ``llama``, in Llama 3's proportions; ``smollm2``, in SmolLM2-135M's; or
            ``gpt2``, with its dropout.
        threads: torch's; 0 leaves them.
    """

    hidden_size: int = 1024
    layers: int = 8
    rank: int = 8
    first: int = 7
    last: int = 7
    tied: bool = False
    edited: str = "all"
    batch: int = 4
    length: int = 256
    prompt: int = 64
    shared: int = 0
    samples: int = 0
    vocabulary: int = 4096
    base: str = "llama"
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2

    @classmethod
    def read(cls, values: dict[str, Any]) -> Setting:
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def asdict(self) -> dict[str, Any]:
        return asdict(self)

    def but(self, **changes: Any) -> Setting:
        return replace(self, **changes)

    @property
    def edited_layers(self) -> list[int]:
        start = {"all": 0, "upper": self.layers // 2, "last": self.layers - 1}
        return list(range(start[self.edited], self.layers))


@dataclass
class Batch:
    """Inputs of one forward: rows of samples padded on the right, or packed."""

    inputs: dict[str, Any]
    prompts: list[int]
    useful_tokens: int


def clock(setting: Setting) -> Callable[[], float]:
    """Seconds, once the device has done what it was given."""
    if setting.device == "cpu":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def llama_config(setting: Setting) -> Any:
    """Llama-3's proportions at any size: 4 query heads to a key, wide MLP."""
    from transformers import LlamaConfig

    d = setting.hidden_size
    heads = max(d // (128 if d >= 4096 else 64), 1)
    return LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=d,
        intermediate_size=7 * d // 2,
        num_hidden_layers=setting.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        max_position_embeddings=16384,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def base_config(setting: Setting) -> Any:
    if setting.base == "gpt2":
        from transformers import GPT2Config

        return GPT2Config(
            vocab_size=setting.vocabulary,
            n_embd=setting.hidden_size,
            n_layer=setting.layers,
            n_head=setting.hidden_size // 64,
            bos_token_id=1,
            eos_token_id=2,
        )
    config = llama_config(setting)
    if setting.base == "smollm2":
        config.num_key_value_heads = config.num_attention_heads // 3
        config.intermediate_size = 8 * setting.hidden_size // 3
        config.tie_word_embeddings = True
    return config


def build_base(setting: Setting) -> nn.Module:
    """A frozen model of random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(setting.device):
        model: Any = AutoModelForCausalLM.from_config(base_config(setting))
    model.requires_grad_(False)
    return model.to(getattr(torch, setting.dtype))


def share(model: nn.Module) -> nn.Module:
    """A model of its own on the same weights."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


def rectangle(setting: Setting, seed: int = 1) -> Batch:
    """``batch`` samples of ``length`` tokens, with prompts of the same length, that
    begin with the same ``shared`` tokens for any seed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (setting.batch, setting.length)
    ids = torch.randint(3, setting.vocabulary, shape, generator=generator)
    ids[:, : setting.shared] = torch.arange(setting.shared) % setting.vocabulary
    labels = ids.clone()
    labels[:, : setting.prompt] = -100
    inputs = {"input_ids": ids, "labels": labels}
    return Batch(
        {name: tensor.to(setting.device) for name, tensor in inputs.items()},
        [setting.prompt] * setting.batch,
        ids.numel(),
    )


def ragged_lengths(setting: Setting) -> list[int]:
    """Sample lengths as instructions have them: most are short, a few long."""
    draw = random.Random(2)
    low, high = 2 * (setting.first + setting.last), setting.length
    return [
        min(max(int(draw.lognormvariate(4.2, 0.6)), low), high)
        for _ in range(setting.samples)
    ]


def padded(setting: Setting) -> list[Batch]:
    """The ragged samples in rows of their own, ``batch`` of them padded together."""
    lengths = ragged_lengths(setting)
    return [
        _padded(setting, lengths[start : start + setting.batch])
        for start in range(0, len(lengths), setting.batch)
    ]


def _padded(setting: Setting, lengths: list[int]) -> Batch:
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(length) % (setting.vocabulary - 3) + 3
        labels[row, length // 2 : length] = ids[row, length // 2 : length]
        mask[row, :length] = 1
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return Batch(
        {name: tensor.to(setting.device) for name, tensor in inputs.items()},
        [length // 2 for length in lengths],
        sum(lengths),
    )


def packed(setting: Setting) -> list[Batch]:
    """The same samples, filled one after the other into rows of ``length``."""
    rows: list[list[int]] = []
    for length in sorted(ragged_lengths(setting), reverse=True):
        room = [row for row in rows if sum(row) + length <= setting.length]
        if room:
            room[0].append(length)
        else:
            rows.append([length])
    return [_packed(setting, row) for row in rows]


def _packed(setting: Setting, lengths: list[int]) -> Batch:
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for length in lengths:
        sample = (torch.arange(length) % (setting.vocabulary - 3) + 3).tolist()
        ids += sample
        positions += range(length)
        labels += [-100] * (length // 2) + sample[length // 2 :]
    inputs = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return Batch(
        {k: torch.tensor([v], device=setting.device) for k, v in inputs.items()},
        [length // 2 for length in lengths],
        sum(lengths),
    )
