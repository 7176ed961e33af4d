"""The grammar of layers: ``all``, ``8-15``, ``[3, -1]``."""

from __future__ import annotations

import re

from axolotl_reft.errors import shown

# Nine digits are more than any model has; torch's integers end at nineteen.
LARGEST = 999_999_999
_LAYER_ITEM = re.compile(r" *(-?\d{1,9})(?:-(-?\d{1,9}))? *", re.ASCII)


def parse_layers(
    layers: object, setting: str = "layers"
) -> list[tuple[int, int]] | None:
    """Read ``layers``, or the layers of another setting; ValueError if not understood.

    Returns:
        Inclusive ranges, negative numbers still counting from the top; None for all.
    """
    if layers == "all":
        return None
    items = layers if isinstance(layers, (list, tuple)) and layers else [layers]
    ranges = []
    for item in items:
        number = type(item) is int and abs(item) <= LARGEST
        text = str(item) if number else item
        for part in text.split(",") if isinstance(text, str) else [""]:
            match = _LAYER_ITEM.fullmatch(part)
            if match is None:
                reason = "" if item is layers else f", {shown(item)} is not a layer"
                raise ValueError(
                    f"{setting}: {shown(layers)} is not understood as layers{reason}; "
                    "write for example all, [3, 9, 18, 24], 8-15, or [-1] for the top"
                )
            ranges.append((int(match[1]), int(match[2] or match[1])))
    return ranges


def resolve_layers(layers: object, count: int) -> list[int]:
    """Return the layers that ``layers`` names in a model of ``count``, sorted;
    ValueError if one is outside the model or named twice, or a range is empty."""
    ranges = parse_layers(layers)
    if ranges is None:
        return list(range(count))
    numbers: list[int] = []
    for ends in ranges:
        for end in ends:
            if not -count <= end < count:
                raise ValueError(
                    f"layers: {end} in {shown(layers)} is out of range, the base model "
                    f"has {count} layers; use 0 to {count - 1}, or -{count} to -1"
                )
        start, stop = (end % count for end in ends)
        if start > stop:
            raise ValueError(
                f"layers: the range {ends[0]}-{ends[1]} in {shown(layers)} is empty in "
                f"a model of {count} layers; write the lower layer first"
            )
        numbers.extend(range(start, stop + 1))
    if twice := [number for number in numbers if numbers.count(number) > 1]:
        raise ValueError(
            f"layers: {shown(layers)} names layer {min(twice)} twice; name it once. "
            "One intervention each for prefix and suffix is tied_weights: false"
        )
    return sorted(numbers)
