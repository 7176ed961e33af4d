"""The grammar of layers and of ranks by layer: ``all``, ``8-15``, ``[3, -1]``."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from axolotl_reft.errors import shown
from axolotl_reft.settings.components import component_layer

# Nine digits are more than any model has; torch's integers end at nineteen.
LARGEST = 999_999_999
_LAYER_ITEM = re.compile(r"(-?\d{1,9})(?:-(-?\d{1,9}))?", re.ASCII)


def edited_layers(layers: object, component: str, count: int) -> list[int]:
    """Return the layers an adapter edits in a model of ``count``, sorted.

    Raises:
        ValueError: as :func:`resolve_layers`.
    """
    named = component_layer(component)
    if named is None:
        return resolve_layers(layers, count)
    if named >= count:
        raise ValueError(
            f"component: {component!r} names layer {named}, and the base model "
            f"has {count} layers; use 0 to {count - 1}"
        )
    return [named]


def layer_ranks(
    rank: int | dict[Any, int], layers: object, component: str, count: int
) -> dict[int, int]:
    """Return the rank of each edited layer in a model of ``count`` layers.

    Raises:
        ValueError: as :func:`resolve_layers`, or the mapping of ranks and the edited
            layers do not agree.
    """
    edited = edited_layers(layers, component, count)
    if not isinstance(rank, dict):
        return dict.fromkeys(edited, rank)
    ranks: dict[int, int] = {}
    for named, value in rank.items():
        if named == "all":
            continue
        for number in resolve_layers(named, count):
            if number in ranks:
                raise ValueError(f"rank: layer {number} has two ranks; give it one")
            if number not in edited:
                raise ValueError(
                    f"rank: layer {number} has a rank, but is not among layers: "
                    f"{layers!r}; name it there, or leave out its rank"
                )
            ranks[number] = value
    without = [number for number in edited if number not in ranks]
    if without and "all" not in rank:
        raise ValueError(
            f"rank: layer {without[0]} has none; name it in the mapping, or give the "
            "rank of the others as all"
        )
    return ranks | dict.fromkeys(without, rank.get("all", 0))


def parse_layers(
    layers: object, setting: str = "layers"
) -> list[tuple[int, int]] | None:
    """Read the ``layers`` setting, or the layers of another one.

    Returns:
        Inclusive ranges, negative numbers still counting from the top; None for all.

    Raises:
        ValueError: the setting is not understood.
    """
    if layers == "all":
        return None
    items = layers if isinstance(layers, (list, tuple)) else [layers]
    ranges = []
    for item in items:
        for part in _parts(item):
            match = _LAYER_ITEM.fullmatch(part.strip(" "))
            if match is None:
                reason = "" if item is layers else f", {shown(item)} is not a layer"
                raise _bad_layers(setting, layers, reason)
            start = int(match[1])
            ranges.append((start, int(match[2]) if match[2] else start))
    if not ranges:
        raise _bad_layers(setting, layers, ", no layer is named")
    return ranges


def _parts(item: object) -> list[str]:
    """Split at commas; an item that is neither a number nor text is unreadable."""
    if type(item) is int and abs(item) <= LARGEST:
        return [str(item)]
    return item.split(",") if isinstance(item, str) else [""]


def _bad_layers(setting: str, layers: object, reason: str) -> ValueError:
    if setting != "layers":
        return ValueError(
            f"{setting}: {shown(layers)} is not understood as layers{reason}. Write "
            "for example {0-15: 4, all: 8}"
        )
    return ValueError(
        f"layers: {shown(layers)} is not understood{reason}. Write layers: all, a "
        "list such as [3, 9, 18, 24], a range such as 8-15, or negative numbers from "
        "the top such as [-1]"
    )


def resolve_layers(layers: object, count: int) -> list[int]:
    """Return the layers that ``layers`` names in a model of ``count``, sorted.

    Raises:
        ValueError: a layer is outside the model, named twice, or a range is empty.
    """
    ranges = parse_layers(layers)
    if ranges is None:
        return list(range(count))
    numbers: list[int] = []
    for ends in ranges:
        for end in ends:
            if not -count <= end < count:
                raise ValueError(
                    f"layers: {end} in {shown(layers)} is out of range, the base model "
                    f"has {count} layers; use 0 to {count - 1}, or -{count} to -1 from "
                    "the top"
                )
        start, stop = (end % count for end in ends)
        if start > stop:
            raise ValueError(
                f"layers: the range {ends[0]}-{ends[1]} in {shown(layers)} is empty in "
                f"a model of {count} layers; write the lower layer first"
            )
        numbers.extend(range(start, stop + 1))
    if len(set(numbers)) < len(numbers):
        twice = min(n for n, times in Counter(numbers).items() if times > 1)
        raise ValueError(
            f"layers: {shown(layers)} names layer {twice} twice; name it once. One "
            "intervention each for prefix and suffix is tied_weights: false"
        )
    return sorted(numbers)
