"""Keys of an adapter's tensors, in its file and in a model's state dict.

In a file: ``base_model.model.<path of the layers>.<layer>.<part>.<tensor>``, where the
part is ``intv_0``, ``intv_1`` (the suffix's intervention, where untied) or
``intv_lora``. In a model the adapter's name stands ahead of the tensor's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART = r"intv_(?P<part>0|1|lora)"
_SAVED = re.compile(
    rf"base_model\.model\.(?P<layers>.+)\.(?P<layer>\d+)\.{_PART}\.(?P<tensor>\w+)"
)
_IN_A_MODEL = re.compile(rf"\.{_PART}\.(?P<adapter>[^.]+)\.\w+$")


@dataclass(frozen=True)
class SavedKey:
    """The parts of a saved tensor's key.

    Attributes:
        layers: path of the base model's list of layers.
        layer: number of the layer.
        side: 0, 1 for a suffix of its own, or None for LoRA.
        tensor: name of the tensor.
    """

    layers: str
    layer: int
    side: int | None
    tensor: str


def parse_saved_key(key: str) -> SavedKey | None:
    """Read a key of an adapter's file; None if it is not of an intervention or LoRA."""
    match = _SAVED.fullmatch(key)
    if match is None:
        return None
    side = None if match["part"] == "lora" else int(match["part"])
    return SavedKey(match["layers"], int(match["layer"]), side, match["tensor"])


def adapter_of(key: str) -> str | None:
    """Return the name of the adapter that a tensor of a model belongs to, if any."""
    match = _IN_A_MODEL.search(key)
    return match["adapter"] if match else None
