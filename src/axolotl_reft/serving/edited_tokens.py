"""Tokens of a request that its adapter edits, whatever part of them is computed when.

Found once, on the whole prompt: a server computes a prompt in chunks, takes its
beginning from a cache, or computes it again with the answer so far. Needs no vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from axolotl_reft.settings.spec import AdapterSpec

Places = NDArray[np.int64]
# Of a request's extra arguments, the strength of its adapter.
STRENGTH = "loreft_strength"


class EditedTokens:
    """The edited tokens of one request.

    A generated token is edited by ``positions: all`` alone.

    Args:
        spec: of the adapter.
        prompt: token ids.
    """

    def __init__(self, spec: AdapterSpec, prompt: Sequence[int]) -> None:
        self.everywhere = spec.positions.everywhere
        self._sides: list[Places] = []
        if self.everywhere:
            return
        # By numpy, which reads a list in a ninth of the time.
        ids_1P = torch.from_numpy(np.array(prompt, np.int64)).unsqueeze(0)
        spans = spec.turns.spans(torch.ones_like(ids_1P, dtype=torch.bool), ids_1P)
        masks = list(spans.edited(spec.positions))
        if spec.tied:
            masks = [masks[0] | masks[1]]
        self._sides = [mask[0].nonzero().squeeze(1).numpy() for mask in masks]

    def between(self, start: int, stop: int) -> list[Places]:
        """Return the edited tokens from ``start`` to below ``stop``, counted from
        ``start``: of each intervention of a layer."""
        if self.everywhere:
            return [np.arange(stop - start)]
        return [places - start for places in self._cut(start, stop)]

    def key(self, adapter: bytes, start: int, stop: int) -> bytes | None:
        """Return how these tokens are edited, and by which adapter; None where they are
        not, and the base's own keys and values hold."""
        if self.everywhere:
            return adapter
        cut = self._cut(start, stop)
        if not any(places.size for places in cut):
            return None
        sides = [(places - start).astype("<u4").tobytes() for places in cut]
        return adapter + b"".join(len(s).to_bytes(4, "little") + s for s in sides)

    def _cut(self, start: int, stop: int) -> list[Places]:
        return [
            places[slice(*np.searchsorted(places, (start, stop)))]
            for places in self._sides
        ]


def strength_of(request: Any) -> float:
    """Return the strength that a request of vLLM gives its adapter, which the front
    end has checked."""
    return float((request.sampling_params.extra_args or {}).get(STRENGTH, 1))


def tokens_of(request: Any, spec: AdapterSpec) -> EditedTokens:
    """Return the edited tokens of a request of vLLM, found once and kept on it."""
    if not hasattr(request, "loreft_tokens"):
        request.loreft_tokens = EditedTokens(spec, request.prompt_token_ids)
    return request.loreft_tokens
