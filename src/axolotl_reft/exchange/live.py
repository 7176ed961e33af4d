"""pyreft's models from live adapters, and live adapters from pyreft's directories."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from axolotl_reft.exchange.install import import_pyreft
from axolotl_reft.exchange.read import read_directory
from axolotl_reft.exchange.write import new_directory, refuse_lora, write_directory
from axolotl_reft.settings.components import to_pyreft_name
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.layer import LoreftDecoderLayer
from axolotl_reft.tuner.model import find_decoder_layers

if TYPE_CHECKING:
    import pyreft


def to_pyreft(peft_model: PeftModel) -> pyreft.ReftModel:
    """Build a ``pyreft.ReftModel`` that computes what ``peft_model`` does.

    Its interventions are the adapter's own objects, and its base model's weights those
    of the adapter's base: training or changing either changes both. Its modules are
    copies, because pyvene removes every hook of a model that it runs. As always with
    pyreft, the positions are the caller's to pass, as ``unit_locations``. What its
    ``save`` writes is what ``axolotl reft export`` does.

    Raises:
        ValueError: pyreft is missing, the active adapter is not LoReFT, or there are
            several.
    """
    pyreft = import_pyreft()
    active = peft_model.base_model.active_adapters
    if len(active) > 1:
        raise ValueError(
            f"the adapters {', '.join(active)} are active together, and one can be "
            "handed to pyreft; choose it with model.set_adapter"
        )
    name = peft_model.active_adapter
    config = peft_model.peft_config[name]
    if not isinstance(config, LoreftConfig):
        raise ValueError(f"the active adapter {name!r} is not a LoReFT adapter")
    refuse_lora(config, f"the active adapter {name!r}")
    tensors = [*peft_model.parameters(), *peft_model.buffers()]
    base = copy.deepcopy(
        peft_model, {id(tensor): tensor for tensor in tensors}
    ).unload()
    path, _ = find_decoder_layers(base)
    interventions = dict(sorted(_interventions(peft_model, name).items()))
    representations = [
        {
            "layer": layer,
            "component": to_pyreft_name(config.component, path, layer),
            "low_rank_dimension": intervention.rank,
            "intervention": intervention,
        }
        for (_, layer), intervention in interventions.items()
    ]
    reft_config = pyreft.ReftConfig(representations=representations)
    model = _live_class()(reft_config, base)
    model.write = partial(write_directory, config, path, interventions)
    model.disable_model_gradients()
    model.set_device(peft_model.device)
    model.train(peft_model.training)
    return model


@cache
def _live_class() -> Any:
    class LiveReftModel(import_pyreft().ReftModel):  # type: ignore[misc]
        """pyreft's model over our interventions, saved as pyreft saves its own."""

        write: Callable[[Path], None]

        def save(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
            if args or kwargs:
                raise ValueError(
                    "save: only a directory can be saved to here; write it, and upload "
                    "it with huggingface_hub's upload_folder"
                )
            with new_directory(save_directory) as folder:
                self.write(folder)

        def save_intervention(self, save_directory: str, **kwargs: Any) -> None:
            """Save as pyreft's trainer does at every checkpoint."""
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self.write(Path(save_directory))

    return LiveReftModel


def from_pyreft(
    directory: str | os.PathLike[str],
    base_model: PreTrainedModel,
    *,
    positions: str | None = None,
    intervention: str | None = None,
    component: str | None = None,
    dropout: float | None = None,
    act_fn: str | None = None,
) -> PeftModel:
    """Put the adapter that pyreft saved in ``directory`` on ``base_model``.

    Args:
        directory: of ``ReftModel.save``, or a checkpoint of pyreft's trainer.
        positions: what was trained with; needed unless the directory is one that
            ``axolotl reft export`` wrote. Prefix and suffix were untied if there are
            two interventions a layer.
        intervention: needed where a checkpoint does not tell; ``noreft`` reads a LoReFT
            whose rotation is not orthonormal any more.
        component: needed where a checkpoint does not tell: a path within the layer,
            whose dots pyreft wrote as underscores.
        dropout: what was trained with; pyreft does not save it.
        act_fn: likewise.

    Raises:
        ValueError: pyreft is missing, the directory is not pyreft's, is damaged or
            unsafe, or something that it does not tell is missing.
    """
    import_pyreft()
    adapter = read_directory(Path(directory), intervention, component)
    model = get_peft_model(base_model, adapter.config(positions, dropout, act_fn))
    for (side, layer), module in _interventions(model, "default").items():
        module.load_state_dict(adapter.interventions[layer, side])
    return model


def _interventions(
    peft_model: PeftModel, adapter: str
) -> dict[tuple[int, int], nn.Module]:
    """An adapter's interventions by side and layer."""
    return {
        (side, int(path.rpartition(".")[2])): container[adapter]
        for path, module in peft_model.named_modules()
        if isinstance(module, LoreftDecoderLayer)
        for side, container in enumerate((module.intv_0, module.intv_1))
        if adapter in container
    }
