"""A data collator that finds the edited tokens before a batch goes to a device.

On an accelerator, counting edited tokens would make the host wait. The host knows them
from ids and labels alone, so the collator finds their indices and hands them to the
model's forward beside the batch, where the hooks take them out.

Shapes: B batch, T tokens, N edited positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from axolotl_reft.prompts.batch import labelled_spans
from axolotl_reft.prompts.indices import edit_indices
from axolotl_reft.settings.spec import AdapterSpec
from axolotl_reft.tuner.context import POSITIONS
from axolotl_reft.tuner.model import hooks_of


@dataclass(frozen=True)
class EditIndexCollator:
    """A data collator that adds the indices of edited tokens to another one's batches.

    Args:
        collate: the other one, whose batches have ``input_ids`` and ``labels`` (B, T).
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
        batch = self.collate(*args, **kwargs)
        found = indices_of_batch(batch, self.adapters)
        if found:
            batch[POSITIONS] = found
        return batch


def indices_of_batch(
    batch: Mapping[str, Any], adapters: Mapping[str, AdapterSpec]
) -> dict[str, Any]:
    """Return ``shape`` (B, T) and the ``indices`` (N,) into B·T of each adapter's
    interventions; nothing where the batch does not tell them."""
    indices: dict[str, tuple[Tensor, ...]] = {}
    for name, spec in adapters.items():
        if spec.positions.everywhere:
            continue
        spans = labelled_spans(batch, spec.turns)
        if spans is None:
            return {}
        indices[name] = edit_indices(spans, spec.positions, spec.tied).sides
    if not indices:
        return {}
    return {"shape": tuple(batch["input_ids"].shape[:2]), "indices": indices}
