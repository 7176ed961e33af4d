"""The base of an adapter's modules: float32 under any cast, and loaded whole.

Torch only.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from axolotl_reft.core.tensors import check_values


class AdapterLeaf(nn.Module):
    """A module with its parameters directly on it.

    Attributes:
        made_for: sizes of the base and of the adapter, for messages.
    """

    made_for: str

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Follow a move to another device, but stay in float32 under a cast."""

        def without_cast(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return out if out.dtype == tensor.dtype else tensor.to(out.device)

        return super()._apply(without_cast, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object
    ) -> None:
        for name, tensor in self.state_dict(keep_vars=True).items():
            key = prefix + name
            if (saved := state_dict.get(key)) is None:
                continue
            if saved.shape != tensor.shape:
                raise ValueError(
                    f"the adapter's {key} has shape {tuple(saved.shape)}, but this "
                    f"base model with {self.made_for} needs {tuple(tensor.shape)}; "
                    "load it on the base model it was trained on"
                )
            check_values(key, saved)
            # FSDP2 loads with assign=True, and wraps what it hands over: a parameter
            # would take the place of a buffer, and be trained.
            if name in self._buffers and isinstance(saved, nn.Parameter):
                state_dict[key] = saved.detach()
        super()._load_from_state_dict(state_dict, prefix, *args)
