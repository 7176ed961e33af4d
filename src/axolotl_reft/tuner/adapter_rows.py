"""One batch with an adapter for each of its rows: PEFT's ``adapter_names``.

Rows are grouped by adapter, so that each adapter computes once, on all of its rows.
Torch only.

Shapes: B batch, T tokens, N tokens of an adapter's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# PEFT's name for no adapter.
BASE = "__base__"


@dataclass(frozen=True)
class AdapterRows:
    """The adapter of each row of a batch, :data:`BASE` for none."""

    names: tuple[str, ...]

    @classmethod
    def of_batch(cls, names: Sequence[str], rows: int, expands: bool) -> AdapterRows:
        """The names of the rows of one forward.

        Args:
            names: as the caller gave them, one for each of his rows.
            rows: of the forward.
            expands: whether it may have several rows for one of the caller's, as
                ``generate`` makes for beams: the copies of a row are neighbours.

        Raises:
            ValueError: there are more names than rows, or too few.
        """
        copies, rest = divmod(rows, len(names)) if names else (0, rows)
        if rest or copies != 1 and not expands:
            raise wrong_length(names, rows)
        return cls(tuple(name for name in names for _ in range(copies)))

    @property
    def adapters(self) -> list[str]:
        """Every adapter that has a row, once."""
        return [name for name in dict.fromkeys(self.names) if name != BASE]

    def count(self, adapter: str) -> int:
        """Return the number of the adapter's rows."""
        return self.names.count(adapter)

    def mask(self, adapter: str, device: torch.device) -> Tensor:
        """True (B, 1) in the adapter's rows."""
        return torch.tensor([[name == adapter] for name in self.names], device=device)

    def tokens(self, adapter: str, width: int, device: torch.device) -> Tensor:
        """Flat indices (N,) into B·T of all tokens in the adapter's rows."""
        rows = [row for row, name in enumerate(self.names) if name == adapter]
        starts_N1 = torch.tensor(rows, device=device).unsqueeze(1) * width
        return (starts_N1 + torch.arange(width, device=device)).flatten()


def wrong_length(names: Sequence[str], rows: int) -> ValueError:
    """PEFT's message."""
    return ValueError(
        "Length of `adapter_names` should be the same as the number of inputs, but got "
        f"{len(names)} and {rows} respectively."
    )
