"""A module of the base model with its interventions around it.

Shapes: B batch, T tokens, N edited positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from axolotl_reft.config import LoreftConfig
from axolotl_reft.positions import Positions
from axolotl_reft.prompts import PromptTracker


def edit(
    h_BTD: Tensor, indices: Sequence[Tensor], interventions: Sequence[nn.Module]
) -> Tensor:
    """Hidden states with the vectors at ``indices`` replaced by their edits.

    Args:
        h_BTD: hidden states; not changed in place.
        indices: one (N,) tensor of flat indices into B·T per intervention, no index
            twice; B·T itself, one past the end, marks an unused slot.
        interventions: as many, called with (N, D).
    """
    flat = h_BTD.reshape(-1, h_BTD.shape[-1])
    # A row past the end, for unused slots to read from and to write to.
    padded = F.pad(flat, (0, 0, 0, 1))
    indices = [index.to(flat.device) for index in indices]
    new_ND = torch.cat(
        [
            intervention(padded.index_select(0, index))
            for index, intervention in zip(indices, interventions, strict=True)
        ]
    )
    padded.index_copy_(0, torch.cat(indices), new_ND)
    return padded[:-1].view(h_BTD.shape)


class LoreftDecoderLayer(nn.Module, BaseTunerLayer):
    """A decoder layer whose output is edited.

    Around the layer and not inside it, so that gradient checkpointing, which replays
    what is inside, never replays an edit. Everything else asked of it, such as a
    layer's ``attention_type``, is answered by the layer; "DecoderLayer" in the name is
    what axolotl's offloading of layers looks for.
    """

    # pyreft's #0 and #1; the second is the suffix's, where that is untied.
    adapter_layer_names = ("intv_0", "intv_1")

    def __init__(
        self, base_layer: nn.Module, tracker: PromptTracker, hidden_size: int
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.intv_0 = nn.ModuleDict()
        self.intv_1 = nn.ModuleDict()
        self.tracker = tracker
        self.hidden_size = hidden_size
        self.positions: dict[str, Positions] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, config: LoreftConfig) -> None:
        """Give the layer fresh interventions under this adapter's name."""
        from axolotl_reft.interventions import INTERVENTION_CLASSES

        positions = Positions.parse(config.positions)
        untied = positions.two_sided and not config.tied_weights
        device = _device_of(self.base_layer)
        for container in (self.intv_0, self.intv_1)[: 2 if untied else 1]:
            intervention = INTERVENTION_CLASSES[config.intervention](
                embed_dim=self.hidden_size,
                low_rank_dimension=config.rank,
                dropout=config.dropout,
                act_fn=config.act_fn,
            )
            # PEFT's low_cpu_mem_usage makes it on the meta device and fills it later.
            if not any(p.is_meta for p in intervention.parameters()):
                intervention.to(device)
            container[adapter_name] = intervention.train(self.training)
        self.positions[adapter_name] = positions
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
        raise cannot_merge()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        before_BTD = output[0] if isinstance(output, tuple) else output
        h_BTD = before_BTD
        for name in self.active_adapters:
            if name in self.intv_0:
                h_BTD = self._edit(h_BTD, name)
        if h_BTD is before_BTD:
            return output
        self.tracker.record(before_BTD, h_BTD)
        return (h_BTD, *output[1:]) if isinstance(output, tuple) else h_BTD

    def _edit(self, h_BTD: Tensor, name: str) -> Tensor:
        interventions = [
            container[name]
            for container in (self.intv_0, self.intv_1)
            if name in container
        ]
        positions = self.positions[name]
        if positions.everywhere:
            return interventions[0](h_BTD)
        indices = self.tracker.indices(positions, tied=len(interventions) == 1)
        return h_BTD if indices is None else edit(h_BTD, indices, interventions)


def cannot_merge() -> ValueError:
    """Why there is nothing that merging could mean."""
    return ValueError(
        "a LoReFT adapter cannot be merged into the base model: it edits hidden states "
        "at some positions of a prompt, which no change of the weights can do. Ship "
        "the adapter (a few megabytes) beside the base and load it with "
        "PeftModel.from_pretrained; unload() gives back the base model"
    )


def _device_of(module: nn.Module) -> torch.device:
    """Where the module computes; the CPU for one without memory (meta)."""
    for parameter in module.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")
