"""pyreft's models from live adapters, and live adapters from pyreft's directories."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, TaskType
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from axolotl_reft.core.kinds import KINDS
from axolotl_reft.exchange.directory import new_directory, refuse_lora, write_directory
from axolotl_reft.exchange.objects import import_pyreft
from axolotl_reft.exchange.read import read_interventions
from axolotl_reft.prompts.positions import Positions
from axolotl_reft.saved.directory import read_adapter_config
from axolotl_reft.settings.components import to_pyreft_name
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.layer import interventions_of
from axolotl_reft.tuner.model import find_decoder_layers, hooks_of

if TYPE_CHECKING:
    import pyreft


def to_pyreft(peft_model: PeftModel) -> pyreft.ReftModel:
    """Build a ``pyreft.ReftModel`` that computes what ``peft_model`` does.

    It shares the adapter's interventions and the base's weights: training or changing
    either changes both. Its modules are copies, because pyvene removes every hook of a
    model that it runs. Positions are passed as ``unit_locations``, as always with
    pyreft. Its ``save`` writes what ``axolotl reft export`` does.

    Raises:
        ValueError: pyreft is missing, or something but one LoReFT adapter is active.
    """
    pyreft = import_pyreft()
    active = peft_model.base_model.active_adapters
    if len(active) > 1:
        raise ValueError(
            f"the adapters {', '.join(active)} are active together; choose one with "
            "model.set_adapter"
        )
    name = peft_model.active_adapter
    config = peft_model.peft_config[name]
    if not isinstance(config, LoreftConfig):
        raise ValueError(f"the active adapter {name!r} is not a LoReFT adapter")
    refuse_lora(config, f"the active adapter {name!r}")
    hooks = hooks_of(peft_model.base_model.model)
    strength = hooks.state.strengths.get(name, 1.0) if hooks else 1.0
    if strength != 1:
        raise ValueError(
            f"the active adapter {name!r} has the strength {strength:g}, and pyreft's "
            f"interventions have none; call model.set_scale({name!r}, 1)"
        )
    tensors = [*peft_model.parameters(), *peft_model.buffers()]
    base = copy.deepcopy(peft_model, {id(t): t for t in tensors}).unload()
    path, _ = find_decoder_layers(base)
    interventions = {
        (found.side, found.layer): found.intervention
        for found in interventions_of(peft_model, name)
    }
    representations = [
        {
            "layer": layer,
            "component": to_pyreft_name(config.component, path, layer),
            "low_rank_dimension": intervention.rank,
            "intervention": intervention,
        }
        for (_, layer), intervention in sorted(interventions.items())
    ]

    def save(save_directory: str, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            raise ValueError(
                "save: only a directory can be saved to; upload it with "
                "huggingface_hub's upload_folder"
            )
        with new_directory(save_directory) as folder:
            write_directory(config, path, interventions, folder)

    def save_intervention(save_directory: str, **kwargs: Any) -> None:
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_directory(config, path, interventions, Path(save_directory))

    model = pyreft.ReftModel(pyreft.ReftConfig(representations=representations), base)
    # Patch: pyreft's would write our state dicts; its trainer calls the second.
    model.save, model.save_intervention = save, save_intervention
    model.disable_model_gradients()
    model.set_device(peft_model.device)
    model.train(peft_model.training)
    return model


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
        positions, dropout, act_fn: what it was trained with, which pyreft does not
            save; read from a directory that ``axolotl reft export`` wrote.
        intervention: needed where a checkpoint does not tell; ``noreft`` reads a LoReFT
            whose rotation is not orthonormal any more.
        component: needed where a checkpoint does not tell: a path within the layer,
            whose dots pyreft wrote as underscores.

    Raises:
        ValueError: pyreft is missing, the directory is not pyreft's, is damaged or
            unsafe, or does not tell enough.
    """
    import_pyreft()
    folder = Path(directory) / "intervenable_model"  # of pyreft's trainer
    folder = folder if folder.is_dir() else Path(directory)
    kind, component, states = read_interventions(folder, intervention, component)
    if (folder / CONFIG_NAME).is_file():
        exported = read_adapter_config(str(folder), "DIR")
        positions = positions or exported.positions
        dropout = exported.dropout if dropout is None else dropout
        act_fn = exported.act_fn if act_fn is None else act_fn
    if positions is None:
        raise ValueError(
            "positions: pyreft does not save which positions an adapter was trained "
            "on; pass --positions, for example --positions f7+l7"
        )
    layers, sides = ({place[i] for place in states} for i in (0, 1))
    if 1 in sides and not Positions.parse(positions).two_sided:
        raise ValueError(
            f"positions: {positions} has one side, but there are two interventions a "
            "layer; pass --positions f<n>+l<m>"
        )
    sizes = {(at, KINDS[kind].sizes(state)[1]) for (at, _), state in states.items()}
    places = len(layers) * len(sides)
    if 0 not in sides or len(states) < places or len(sizes) > len(layers):
        raise ValueError(
            "DIR: interventions for prefix and suffix need the same layers and ranks"
        )
    ranks: dict[str | int, int] = {str(layer): rank for layer, rank in sorted(sizes)}
    config = LoreftConfig(
        task_type=TaskType.CAUSAL_LM,
        layers=sorted(layers),
        positions=positions,
        rank=ranks if len(set(ranks.values())) > 1 else max(ranks.values()),
        tied_weights=len(sides) == 1,
        intervention=kind,
        component=component,
        dropout=dropout or 0.0,
        act_fn=act_fn,
    )
    model = get_peft_model(base_model, config)
    for found in interventions_of(model, "default"):
        found.intervention.load_state_dict(states[found.layer, found.side])
    return model


def import_adapter(
    directory: str, out: str, *, base_model: str | None = None, **settings: Any
) -> None:
    """Write a directory of pyreft's as a PEFT adapter: ``axolotl reft import``.

    Args:
        base_model: path or hub id of the base, whose config is read; needed unless
            ``axolotl reft export`` wrote the directory and knew it.
        settings: of :func:`from_pyreft`.

    Raises:
        ValueError: as there, or ``out`` is in use. Nothing is written then.
    """
    import_pyreft()
    if base_model is None and (Path(directory) / CONFIG_NAME).is_file():
        base_model = read_adapter_config(directory, "DIR").base_model_name_or_path
    if not base_model:
        raise ValueError(
            "base model: DIR does not say which one it is for; pass --base-model"
        )
    try:
        base_config = AutoConfig.from_pretrained(base_model)
    except (OSError, ValueError) as error:
        raise ValueError(f"base model: cannot read {base_model!r}: {error}") from error
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(base_config)
    model = from_pyreft(directory, base, **settings)
    model.peft_config["default"].base_model_name_or_path = base_model
    with new_directory(out) as folder:
        model.save_pretrained(folder)
