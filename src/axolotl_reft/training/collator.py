"""A data collator that finds the edited tokens before a batch goes to a device.

On an accelerator, counting edited tokens would make the host wait. The host knows them
from ids and labels alone; the model's hooks take their indices out of its arguments.

Shapes: B batch, T tokens, N edited positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from axolotl_reft.prompts.batch import labelled_spans
from axolotl_reft.prompts.spans import edit_indices
from axolotl_reft.settings.spec import AdapterSpec
from axolotl_reft.tuner.context import POSITIONS
from axolotl_reft.tuner.model import hooks_of


@dataclass(frozen=True)
class EditIndexCollator:
    """A data collator that adds the indices of edited tokens to another one's batches.

    Added are the ``shape`` (B, T) and the ``indices`` (N,) into B·T of each adapter's
    interventions, to batches with ``input_ids`` and ``labels`` (B, T).

    Args:
        collate: the other collator.
        adapters: settings of the adapters that are trained; :meth:`of` a model's.
    """

    collate: Callable[..., Any]
    adapters: Mapping[str, AdapterSpec]

    @classmethod
    def of(cls, model: Any, collate: Callable[..., Any]) -> EditIndexCollator:
        """Make one for a PEFT model with LoReFT adapters."""
        hooks = hooks_of(model.get_base_model())
        assert hooks is not None, "a model with a LoReFT adapter"
        return cls(collate, dict(hooks.state.adapters))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch, indices = self.collate(*args, **kwargs), {}
        for name, spec in self.adapters.items():
            if spec.positions.everywhere:
                continue
            spans = labelled_spans(batch, spec.turns)
            if spans is None:
                return batch
            indices[name] = edit_indices(spans, spec.positions, spec.tied).sides
        if indices:
            shape = tuple(batch["input_ids"].shape[:2])
            batch[POSITIONS] = {"shape": shape, "indices": indices}
        return batch
