"""What a model reads beside a text: images and audio, with their tokens in the text.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.sweep.building import FIRST_SPECIAL, HIDDEN
from benchmarks.sweep.findings import BaseFailed, first_line

_DO_NOT_MATCH = re.compile(r"tokens: 0,? features:? *(\d+)")
_TOKENS = {
    kind: (f"{kind}_token_id", f"{kind}_token_index") for kind in ("image", "audio")
}
# Arguments that mark the tokens which are not text.
_MARKS = ("mm_token_type_ids", "token_type_ids")
# Tokens that a sound may be, where the base does not say it.
_COUNTS = (64, 50, 32, 26, 25, 16, 13)
_ROWS, _TEXT = 2, 29
# From the ids (B, T).
Extras = Callable[[Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """What the rows of a batch hold.

    Attributes:
        name: text, image or audio.
        extras: returns the model's other arguments for rows with these ids.
        token: that stands for a part of an image or a sound.
        count: of such tokens at the front of each row.
        codebooks: rows of ids for one row of hidden states.
    """

    name: str = "text"
    extras: Extras = lambda ids_BT: {}
    token: int = 0
    count: int = 0
    codebooks: int = 1

    def ids(self, rows: int, tokens: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        ids_BT = torch.randint(5, FIRST_SPECIAL, (rows, tokens), generator=generator)
        ids_BT[:, : self.count] = self.token
        return ids_BT.repeat_interleave(self.codebooks, 0)


def others(base: PreTrainedModel) -> Iterator[Inputs]:
    """Yield images and sounds that the base reads, of the first form that it takes."""
    parameters = inspect.signature(base.forward).parameters
    found = set()
    for name, extras in _candidates(base.config, parameters):
        if name in found:
            continue
        inputs = _fitted(base, name, extras, parameters)
        if inputs is not None:
            found.add(name)
            yield inputs


def _fitted(
    base: PreTrainedModel, name: str, extras: Extras, parameters: Any
) -> Inputs | None:
    """Return inputs with as many tokens as the base says there are features."""
    config = base.config
    tokens = [getattr(config, key, None) for key in _TOKENS[name]]
    token = next((t for t in tokens if isinstance(t, int)), 0)

    def marked(ids_BT: Tensor) -> dict[str, Any]:
        kinds = {n: (ids_BT == token).long() for n in _MARKS if n in parameters}
        return extras(ids_BT) | kinds

    counts = [0, *_COUNTS]
    while counts:
        inputs = Inputs(name, marked, token, counts.pop(0))
        ids_BT = inputs.ids(_ROWS, _TEXT + inputs.count)
        batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
        try:
            with torch.no_grad():
                base(**batch, **inputs.extras(ids_BT))
        except Exception as error:
            match = _DO_NOT_MATCH.search(str(error))
            if match is not None and not inputs.count:
                # Of features some models count the numbers.
                features = int(match[1])
                each = features // _ROWS
                counts = [count for count in (each, each // HIDDEN) if count]
            elif match is None and not inputs.count and name == "image":
                return None
        else:
            return inputs
    return None


def _candidates(config: Any, parameters: Any) -> Iterator[tuple[str, Extras]]:
    if "pixel_values" in parameters:
        for extras in _images(config, parameters):
            yield "image", extras
    if "input_features" in parameters:
        for extras in _sounds(config, parameters):
            yield "audio", extras


def _images(config: Any, parameters: Any) -> Iterator[Extras]:
    vision = getattr(config, "vision_config", None) or config
    size, patch = _first(vision, "image_size", 32), _first(vision, "patch_size", 8)
    frames = getattr(vision, "temporal_patch_size", 1)
    if "image_grid_thw" in parameters:
        for width in (3 * frames * patch**2, 3 * patch**2):
            yield _patches(width)
    for shape in ((3, size, size), (1, 3, size, size), (2, 3, size, size)):
        for sized in (False, True)[: 1 + ("image_sizes" in parameters)]:
            yield _pixels(shape, size if sized else 0, parameters)


def _sounds(config: Any, parameters: Any) -> Iterator[Extras]:
    audio = getattr(config, "audio_config", None)
    audio = audio or getattr(config, "encoder_config", config)
    bins = [getattr(audio, key, None) for key in ("num_mel_bins", "input_dim")]
    mels = next((b for b in bins if isinstance(b, int)), 80)
    longest = 2 * int(getattr(audio, "max_source_positions", 32))
    masks = ("feature_attention_mask", "input_features_mask")
    mask = next((m for m in masks if m in parameters), None)
    for frames in (longest, 200):
        for shape in ((mels, frames), (frames, mels)):
            yield _sound(shape, mask, frames)


def _first(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None) or default
    return value[0] if isinstance(value, (list, tuple)) else value


def _same(rows: int, shape: tuple[int, ...]) -> Tensor:
    """Return random numbers that are the same in each row, alone and in a batch."""
    row = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    return row.expand(rows, *shape).contiguous()


def _pixels(shape: tuple[int, ...], size: int, parameters: Any) -> Extras:
    def pixels(ids_BT: Tensor) -> dict[str, Any]:
        rows = len(ids_BT)
        extras: dict[str, Any] = {"pixel_values": _same(rows, shape)}
        if size:
            extras["image_sizes"] = torch.tensor([[size, size]] * rows)
        if "qformer_input_ids" in parameters:
            extras["qformer_input_ids"] = torch.full((rows, 4), 7)
        if "image_attention_mask" in parameters:
            extras["image_attention_mask"] = torch.ones_like(ids_BT)[..., None]
        if "image_embeds_position_mask" in parameters:
            extras["image_embeds_position_mask"] = torch.zeros_like(ids_BT)
            extras["image_embeds_position_mask"][:, 1:5] = 1
        return extras

    return pixels


def _patches(width: int) -> Extras:
    def patches(ids_BT: Tensor) -> dict[str, Any]:
        rows = len(ids_BT)
        grid = torch.tensor([[1, 4, 4]] * rows)
        pixels = _same(rows, (16, width)).flatten(0, 1)
        return {"pixel_values": pixels, "image_grid_thw": grid}

    return patches


def _sound(shape: tuple[int, int], mask: str | None, frames: int) -> Extras:
    def sound(ids_BT: Tensor) -> dict[str, Any]:
        rows = len(ids_BT)
        extras: dict[str, Any] = {"input_features": _same(rows, shape)}
        if mask is not None:
            extras[mask] = torch.ones(rows, frames, dtype=torch.long)
        return extras

    return sound


def readable(base: PreTrainedModel) -> Inputs:
    """Return text where the base reads it alone, and else what else it needs."""
    codebooks = getattr(base.config, "num_codebooks", 1)
    for plain in (Inputs(), Inputs(codebooks=codebooks)):
        try:
            with torch.no_grad():
                base(input_ids=plain.ids(_ROWS, _TEXT))
        except Exception as error:
            why = first_line(error)
        else:
            return plain
    found = next(others(base), None)
    if found is None:
        raise BaseFailed(why)
    return found
