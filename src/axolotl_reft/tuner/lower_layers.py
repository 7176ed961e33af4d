"""The layers below the first edited one, apart from those above.

Whatever the positions, hidden states there are the frozen base's.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_reft.tuner.layout import hidden_states_of, with_hidden_states


class _StopError(Exception):
    """Ends a forward behind the lower layers."""


class LowerLayers:
    """Computes what layers return, or has them return what is given.

    Args:
        layers: those below the first edited one, at least one.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self.count, self._layers = len(layers), layers
        self._output: Any = None

    def compute(self, forward: Callable[[], Any]) -> Tensor:
        """Return the hidden states (B, T, D) behind the layers in a forward, which
        ends there."""

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            self._output = output
            raise _StopError

        handle = self._layers[-1].register_forward_hook(stop)
        try:
            with torch.no_grad():
                forward()
        except _StopError:
            pass
        finally:
            handle.remove()
        output, self._output = self._output, None
        hidden: Tensor = hidden_states_of(output)
        # Of what a layer returns, for those that will return something else.
        self._like = with_hidden_states(output, hidden[:0])
        return hidden

    @contextmanager
    def given(self, h_BTD: Tensor) -> Iterator[None]:
        """Have the layers return these hidden states without computing any."""
        before = [layer.__dict__.get("forward") for layer in self._layers]
        for layer in self._layers:
            # Patch: a hook cannot keep a module from running.
            layer.__dict__["forward"] = partial(self._return, h_BTD)
        try:
            yield
        finally:
            for layer, forward in zip(self._layers, before, strict=True):
                del layer.__dict__["forward"]
                if forward is not None:
                    layer.__dict__["forward"] = forward

    def _return(self, h_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
        return with_hidden_states(self._like, h_BTD)
