"""Where edits and rotations are made by kernels, and not by operations.

Where they can run, those of kernels.py take the place of editing.py's and
interventions.py's operations and those of rotation_kernels.py of rotation.py's, which
stay the reference and run everywhere else: without a GPU, compiled
(where torch makes its own kernels), at high ranks, with dropout or a nonlinear source,
and where a hook watches an intervention. ``AXOLOTL_REFT_KERNELS=0`` turns them off.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from axolotl_reft.core import rotation
from axolotl_reft.kernels import rotation_launch as rotation_launches
from axolotl_reft.kernels.launch import Backward, Edits, Kept

MOST_RANK = 32
# A rotation is one program's, and torch's products are shared out: on an H200 they
# were slower at rank 8, launches included, and faster at 32. Between is not measured.
MOST_RANK_ROTATED = 8
# Above so many numbers of edited rows, each layer's gradients are a launch of its own:
# what all layers keep would take more memory than launches take time.
_MOST_TOGETHER = 2**27


@cache
def _kernels() -> Any:
    """The kernels, or None where they are turned off or Triton cannot run them."""
    if os.environ.get("AXOLOTL_REFT_KERNELS") == "0" or find_spec("triton") is None:
        return None
    try:
        from axolotl_reft.kernels import edit as kernels

        if torch.cuda.is_available():
            kernels.prepare()
    except Exception as error:
        warnings.warn(
            f"LoReFT: Triton cannot run its kernels here ({error}); torch's operations "
            "take their place, which compute the same and take longer where a batch "
            "has few tokens. With a C compiler installed Triton usually can; "
            "AXOLOTL_REFT_KERNELS=0 silences this",
            UserWarning,
            stacklevel=2,
        )
        return None
    return kernels


def run_on(device: torch.device) -> bool:
    """Whether the kernels do: on NVIDIA's GPUs, and interpreted, as tests have it."""
    if device.type == "cuda":
        wanted = torch.version.cuda is not None
    else:
        wanted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return wanted and not torch.compiler.is_compiling() and _kernels() is not None


def can_edit(h_BTD: Tensor, interventions: Sequence[Any]) -> bool:
    """Whether :func:`edit` takes these."""
    return run_on(h_BTD.device) and _place(interventions) == h_BTD.device


def _place(interventions: Sequence[Any]) -> torch.device | None:
    """Where the interventions' numbers are that kernels can read; None where they must
    not."""
    places = set()
    for one in interventions:
        if one.rank > MOST_RANK or not (one.affine and one.unwatched):
            return None
        bias = one._parameters.get("bias")
        places.add(None if bias is None else bias.device)
    return places.pop() if len(places) == 1 else None


def edit(
    h_BTD: Tensor, indices: Sequence[Tensor], interventions: Sequence[Any]
) -> Tensor:
    """What editing.py's ``edit`` returns, for one or two of interventions.py's, alike
    and of one rank, that :func:`can_edit` took."""
    return Edits(_kernels(), [interventions]).at(h_BTD, indices).edit(0, h_BTD)


def rotate(
    vectors: Sequence[Tensor], bases: Sequence[Tensor]
) -> tuple[Tensor, Kept, Backward]:
    """What rotation.py's function of this name returns, by the kernels where they can,
    and the ``rotate_backward`` for it."""
    device, rank = vectors[0].device, vectors[0].shape[1]
    by_kernels = (
        rank <= MOST_RANK_ROTATED
        and run_on(device)
        and rotation_launches.can_be_addressed([*vectors, *bases])
    )
    how = rotation_launches if by_kernels else rotation
    return *how.rotate(vectors, bases), how.rotate_backward


class Alike(NamedTuple):
    """Layers that one adapter edits alike, on one device."""

    device: torch.device
    adapter: str
    layers: Sequence[Any]
    edits: Edits


def prepare(edited: Mapping[Any, tuple[str, Sequence[Any]]]) -> list[Alike]:
    """What of the edits of a forward can be made ready before there are hidden states,
    for layers that are alike together.

    Args:
        edited: by layer of layer.py's, what its ``only_edit`` said.

    Returns:
        Without the layers whose numbers kernels must not read.
    """
    alike: dict[Any, list[Any]] = defaultdict(list)
    for layer, (name, interventions) in edited.items():
        device = _place(interventions)
        if device is not None:
            one = interventions[0]
            own = (layer, interventions)
            alike[device, name, one.hidden_size, one.rank].append(own)
    groups = []
    for (device, name, *_), some in alike.items():
        layers, interventions = zip(*some, strict=True)
        edits = Edits(_kernels(), interventions, rotate)
        groups.append(Alike(device, name, layers, edits))
    return groups


def plan(
    h_BTD: Tensor, groups: Iterable[Alike]
) -> dict[Any, Callable[[Tensor], Tensor] | None]:
    """By layer, what edits its hidden states, once.

    In tight loops, as :func:`prepare` is: a device that has one layer to compute waits
    for it.

    Args:
        h_BTD: the hidden states of one of them, on a device that :func:`run_on` takes.
        groups: of :func:`prepare`; those on this device are planned, each once.
    """
    planned: dict[Any, Callable[[Tensor], Tensor] | None] = {}
    for device, name, layers, edits in groups:
        if device != h_BTD.device:
            continue
        indices = layers[0].indices(name)
        if indices is None or not _few(h_BTD, indices, layers):
            continue
        edits.at(h_BTD, indices)
        for number, layer in enumerate(layers):
            planned[layer] = partial(edits.edit, number)
    return planned


def _few(h_BTD: Tensor, indices: Sequence[Tensor], layers: Sequence[Any]) -> bool:
    rows = sum(index.shape[0] for index in indices)
    return len(layers) * rows * h_BTD.shape[-1] <= _MOST_TOGETHER
