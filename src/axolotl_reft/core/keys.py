"""Keys of an adapter's tensors, in its file and in a model's state dict.

In a file: ``base_model.model.<path of the layers>.<layer>.<part>.<tensor>``, where the
part is ``intv_0``, ``intv_1`` (the suffix's intervention, where untied) or
``intv_lora``. In a model the adapter's name stands ahead of the tensor's.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_PART = r"intv_(?P<part>0|1|lora)"
_SAVED = re.compile(rf"base_model\.model\.(.+)\.(\d+)\.{_PART}\.(\w+)")
_IN_A_MODEL = re.compile(rf"\.{_PART}\.(?P<adapter>[^.]+)\.\w+$")


class SavedKey(NamedTuple):
    """A saved tensor's key: the path of the base model's list of layers, the layer's
    number, the side (None for LoRA), and the tensor's name."""

    layers: str
    layer: int
    side: int | None
    tensor: str


def parse_saved_key(key: str) -> SavedKey | None:
    """Read a key of an adapter's file; None if it is not of an intervention or LoRA."""
    if (match := _SAVED.fullmatch(key)) is None:
        return None
    layers, layer, part, tensor = match.groups()
    side = None if part == "lora" else int(part)
    return SavedKey(layers, int(layer), side, tensor)


def adapter_of(key: str) -> str | None:
    """Return the name of the adapter that a tensor of a model belongs to, if any."""
    match = _IN_A_MODEL.search(key)
    return match["adapter"] if match else None
