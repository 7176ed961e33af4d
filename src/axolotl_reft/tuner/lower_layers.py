"""The layers below the first edited one, apart from those above.

Whatever the positions, hidden states there are the frozen base's.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_reft.tuner.context import ModelState
from axolotl_reft.tuner.layout import hidden_states_of, with_hidden_states
from axolotl_reft.tuner.preamble_cache import StopForwardError


class LowerLayers:
    """Computes what layers return, or has them return what is given, in this thread.

    Args:
        layers: those below the first edited one, at least one.
    """

    def __init__(self, layers: Sequence[nn.Module], state: ModelState) -> None:
        self.count, self._layers, self._state = len(layers), layers, state
        # Of the instance: accelerate puts its own there.
        self._before = [layer.__dict__.get("forward") for layer in layers]
        for layer in layers:
            # Patch: a hook cannot keep a module from running.
            layer.__dict__["forward"] = partial(self._forward, layer, layer.forward)

    def detach(self) -> None:
        """Leave the layers as they were."""
        for layer, forward in zip(self._layers, self._before, strict=True):
            del layer.__dict__["forward"]
            if forward is not None:
                layer.__dict__["forward"] = forward

    def _forward(
        self, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        thread = self._state.thread
        if thread.below is not None:
            return with_hidden_states(self._like, thread.below)
        output = forward(*args, **kwargs)
        if thread.stops_below and layer is self._layers[-1]:
            raise StopForwardError(output)
        return output

    def compute(self, forward: Callable[[], Any]) -> Tensor:
        """Return the hidden states (B, T, D) behind the layers in a forward, which
        ends there."""
        thread = self._state.thread
        thread.stops_below = True
        try:
            with torch.no_grad():
                forward()
        except StopForwardError as stop:
            output = stop.output
        finally:
            thread.stops_below = False
        hidden: Tensor = hidden_states_of(output)
        # Of what a layer returns, for when it will return what is given.
        self._like = with_hidden_states(output, hidden[:0])
        return hidden

    @contextmanager
    def given(self, h_BTD: Tensor) -> Iterator[None]:
        """Have the layers return these hidden states without computing any."""
        thread = self._state.thread
        thread.below = h_BTD
        try:
            yield
        finally:
            thread.below = None
