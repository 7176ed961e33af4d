"""Load a base model once for several trainings in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from axolotl.loaders import ModelLoader
from axolotl.utils.logging import get_logger
from torch import Tensor, nn

LOG = get_logger(__name__)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class KeptBase:
    """A base as it was loaded, of which every training is given a copy.

    A copy shares the weights' memory and nothing else: hooks, replaced methods, dtypes
    and the config of one training are not seen by the next. Before each copy the
    weights are compared, by their checksums, with those that were loaded.
    """

    def __init__(self) -> None:
        self._source: Any = None
        self._model: nn.Module | None = None
        self._checksums: dict[str, int] = {}

    def load(self, source: Any, load: Callable[[], nn.Module]) -> nn.Module:
        """Return a copy of what ``load`` returned for an equal ``source``."""
        if self._model is not None and self._source == source:
            if checksums(self._model) == self._checksums:
                return copy_sharing_weights(self._model)
            LOG.warning("a run changed the base's weights; the base is loaded again")
        self._model = None
        model = load()
        if not can_be_shared(model):
            LOG.info("this base cannot be shared by runs; each run loads it")
            return model
        self._model, self._source = model, source
        self._checksums = checksums(model)
        return copy_sharing_weights(model)


@contextmanager
def keep_base() -> Iterator[None]:
    """Have axolotl load the base of all trainings within once."""
    kept, original = KeptBase(), ModelLoader._load_model_from_pretrained

    def load(self: Any, model_loader_class: Any = None) -> nn.Module:
        settings = {k: repr(v) for k, v in self.model_kwargs.items()}
        source = (
            self.base_model,
            model_loader_class or self.auto_model_loader,
            self.model_config.to_dict(),
            settings,
        )
        return kept.load(source, lambda: original(self, model_loader_class))

    # Patch: axolotl has no hook in place of loading.
    ModelLoader._load_model_from_pretrained = load
    try:
        yield
    finally:
        ModelLoader._load_model_from_pretrained = original


def can_be_shared(model: nn.Module) -> bool:
    """Return whether a copy is the same model: the parameters are plain, on devices,
    and no method or hook holds on to the modules that it was made for."""
    plain = all(type(p) is nn.Parameter and not p.is_meta for p in model.parameters())
    return plain and not any(
        "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
        for module in model.modules()
    )


def copy_sharing_weights(model: nn.Module) -> nn.Module:
    """Copy a model except for the memory of its parameters."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        # Of its own, so that a change of dtype or device is the copy's.
        memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    return deepcopy(model, memo)


def checksums(model: nn.Module) -> dict[str, int]:
    """Return the sum of the bits of each parameter and buffer, as integers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: _checksum(tensor.detach()) for name, tensor in tensors.items()}


def _checksum(tensor: Tensor) -> int:
    bits = tensor.contiguous().view(_INTEGERS[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))
