"""Whether two parts of a forward save time, and whether a base is still what it was."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from axolotl_reft.tuner.two_parts import TwoParts

# A pass through the layers takes so long beside its products, in FLOPs for each layer.
# Measured on two CPU cores; on accelerators computed from the launches of a layer (25)
# and bfloat16 products, and not measured.
_FLOPS_OF_A_PASS = {"cpu": 8e7, "cuda": 2.4e11}
# What must be saved at least, of the plain forward and backward: by token, the second
# part takes up to a fifth more.
_SAVED = 0.2


def saves_time(
    backbone: PreTrainedModel, tokens: int, parts: TwoParts, backward: float
) -> bool:
    """Whether two parts take less time than the whole.

    Times are counted in tokens forward: n·(1 + β) against n₁ + n₂·(1 + β) and the time
    that one more pass takes beside its products, padding included.

    Args:
        tokens: n.
        backward: β, the share of the layers that backward passes.
    """
    before = parts.tokens_before + _tokens_of_a_pass(backbone)
    behind = parts.tokens_behind * (1 + backward)
    return before + behind <= (1 - _SAVED) * tokens * (1 + backward)


def lower_saves_time(
    backbone: PreTrainedModel, tokens: int, below: float, backward: float
) -> bool:
    """Whether it saves time to leave out the layers below, once they are kept.

    Args:
        below: their share of the layers.
    """
    saved = tokens * below - _tokens_of_a_pass(backbone)
    return saved >= _SAVED * tokens * (1 + backward)


def _tokens_of_a_pass(backbone: PreTrainedModel) -> float:
    # A layer has about 12·d² parameters, of two operations each for a token.
    by_token = 24 * backbone.config.get_text_config().hidden_size ** 2
    device = "cpu" if backbone.device.type == "cpu" else "cuda"
    return _FLOPS_OF_A_PASS[device] / by_token


class Fingerprint:
    """Tells whether a base is still the one whose keys and values were kept: its
    parameters' places in memory, versions and dtypes, and the dtype of autocast."""

    def __init__(self, backbone: nn.Module, adapters: str) -> None:
        modules = list(_modules_of(backbone, adapters))
        named = [
            (path + name, tensor)
            for path, module in modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        self.trained = next((n for n, t in named if t.requires_grad), None)
        device = named[0][1].device.type
        is_autocast = torch.is_autocast_enabled(device)
        self._autocast = is_autocast and torch.get_autocast_dtype(device)
        self.is_sharded = any(isinstance(module, FSDPModule) for _, module in modules)
        if self.is_sharded:
            named = [(n, t.to_local()) for n, t in named if isinstance(t, DTensor)]
        dtypes = {t.dtype for _, t in named if t.dtype != torch.long}
        self.is_float32 = dtypes <= {torch.float32} and not is_autocast
        self._seen = {name: _seen(tensor) for name, tensor in named}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint) or self._autocast != other._autocast:
            return False
        if not (self.is_sharded and other.is_sharded):
            return self._seen == other._seen
        # FSDP2 has parameters whole while it computes, or until backward.
        return all(other._seen.get(n, seen) == seen for n, seen in self._seen.items())


def _modules_of(backbone: nn.Module, adapters: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the base's modules with the beginnings of their tensors' names, in less
    than half the time of ``named_parameters``: before each forward, this counts."""
    found = [("", backbone)]
    while found:
        path, module = found.pop()
        yield path, module
        for name, child in module._modules.items():
            if child is not None and adapters not in name:
                found.append((f"{path}{name}.", child))


def _seen(tensor: Tensor) -> tuple[int, int, torch.dtype]:
    return tensor.data_ptr(), tensor._version, tensor.dtype
