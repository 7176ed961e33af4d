"""Where edits are made by the kernels of kernels.py, and not by operations.

Where they can run they take the place of editing.py's and interventions.py's
operations, which stay the reference and run everywhere else: without a GPU, compiled
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
from typing import Any

import torch
from torch import Tensor

from axolotl_reft.launches import Edits
from axolotl_reft.shared_rotations import shared_rotations

MOST_RANK = 32
# Above so many numbers of edited rows, each layer's gradients are a launch of its own:
# what all layers keep would take more memory than launches take time.
_MOST_TOGETHER = 2**27


@cache
def _kernels() -> Any:
    """The kernels, or None where they are turned off or Triton cannot run them."""
    if os.environ.get("AXOLOTL_REFT_KERNELS") == "0" or find_spec("triton") is None:
        return None
    try:
        from axolotl_reft import kernels

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
    return run_on(h_BTD.device) and _are_plain(h_BTD.device, interventions)


def _are_plain(device: torch.device, interventions: Sequence[Any]) -> bool:
    for one in interventions:
        if one.rank > MOST_RANK or not (one.affine and one.unwatched):
            return False
        # Elsewhere, a kernel would read what is not there.
        bias = one._parameters.get("bias")
        if bias is None or bias.device != device:
            return False
    return True


def edit(
    h_BTD: Tensor, indices: Sequence[Tensor], interventions: Sequence[Any]
) -> Tensor:
    """What editing.py's ``edit`` returns, for one or two of interventions.py's, alike
    and of one rank, that :func:`can_edit` took."""
    return Edits(_kernels(), h_BTD, indices, [interventions]).edit(0, h_BTD)


def plan(
    h_BTD: Tensor, layers: Iterable[Any], matrices: Mapping[Any, Tensor] | None = None
) -> dict[Any, Callable[[Tensor], Tensor] | None]:
    """Edits of layers that are alike, made ready together.

    In tight loops: a device that has one layer to compute waits for it.

    Args:
        h_BTD: the hidden states of one of them, on a device that :func:`run_on` takes.
        layers: layer.py's.
        matrices: those of shared_rotations.py, where they are computed already.

    Returns:
        By layer, what edits its hidden states, once; without the layers of which
        something else happens, or that :func:`can_edit` does not take.
    """
    alike: dict[tuple[str, int, int], list[Any]] = defaultdict(list)
    for layer in layers:
        name, interventions = layer.only_edit() or ("", [])
        if interventions and _are_plain(h_BTD.device, interventions):
            one = interventions[0]
            alike[name, one.hidden_size, one.rank].append((layer, interventions))
    groups = []
    for (name, *_), some in alike.items():
        own_layers, interventions = zip(*some, strict=True)
        indices = own_layers[0].indices(name)
        if indices is not None and _few(h_BTD, indices, own_layers):
            groups.append((own_layers, indices, interventions))
    if matrices is None and torch.is_grad_enabled():  # else each keeps its own
        everyone = [one for *_, some in groups for own in some for one in own]
        matrices = shared_rotations(everyone)
    planned: dict[Any, Callable[[Tensor], Tensor] | None] = {}
    for own_layers, indices, interventions in groups:
        edits = Edits(_kernels(), h_BTD, indices, interventions, matrices)
        for number, layer in enumerate(own_layers):
            planned[layer] = partial(edits.edit, number)
    return planned


def _few(h_BTD: Tensor, indices: Sequence[Tensor], layers: Sequence[Any]) -> bool:
    rows = sum(index.shape[0] for index in indices)
    return len(layers) * rows * h_BTD.shape[-1] <= _MOST_TOGETHER
