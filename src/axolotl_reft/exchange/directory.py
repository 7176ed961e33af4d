"""``axolotl reft export`` and ``import``: adapters to pyreft's format, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from transformers import AutoConfig, AutoModelForCausalLM

from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.core.kinds import KINDS
from axolotl_reft.core.tensors import check_tensors
from axolotl_reft.exchange.install import import_pyreft
from axolotl_reft.exchange.live import from_pyreft
from axolotl_reft.exchange.write import new_directory, refuse_lora, write_directory
from axolotl_reft.saved.directory import read_adapter_config, read_tensors
from axolotl_reft.settings.components import to_pyreft_name


def export_adapter(directory: str, out: str) -> str | None:
    """Write a saved LoReFT adapter as a directory of pyreft's.

    Returns:
        The component, if it has no name, which pyreft 0.1.0 cannot load.

    Raises:
        ValueError: pyreft is missing, there is no such adapter, pyreft has no place for
            something in it, or ``out`` is in use. Nothing is written then.
    """
    import_pyreft()
    config = read_adapter_config(directory, "DIR")
    refuse_lora(config, "DIR: the adapter")
    saved = read_tensors(directory, "DIR")
    if saved.others:
        raise ValueError(
            f"DIR: the adapter also holds {min(saved.others)!r}, for which pyreft's "
            "format has no place; export an adapter without modules_to_save"
        )
    kind = KINDS[config.intervention]
    interventions = {}
    for (layer, side), state in saved.interventions.items():
        width, rank = kind.sizes(state)
        check_tensors(state, kind.expected_shapes(width, rank), saved.file)
        ours = INTERVENTION_CLASSES[config.intervention](
            embed_dim=width, low_rank_dimension=rank
        )
        ours.load_state_dict(state)
        interventions[side, layer] = ours
    with new_directory(out) as folder:
        write_directory(config, saved.layers, interventions, folder)
    component = to_pyreft_name(config.component, saved.layers, 0)
    return component if "." in component else None


def import_adapter(
    directory: str, out: str, *, base_model: str | None = None, **settings: Any
) -> None:
    """Write a directory of pyreft's as a PEFT adapter.

    Args:
        base_model: path or hub id of the base; only its config is read. Needed unless
            the directory is one that :func:`export_adapter` wrote.
        settings: :func:`~axolotl_reft.from_pyreft`'s.

    Raises:
        ValueError: as there, or ``out`` is in use. Nothing is written then.
    """
    import_pyreft()
    if base_model is None and (Path(directory) / CONFIG_NAME).is_file():
        base_model = read_adapter_config(directory, "DIR").base_model_name_or_path
    if not base_model:
        raise ValueError(
            "base model: DIR does not say which one the adapter is for, as pyreft's "
            "never do; pass --base-model"
        )
    try:
        base_config = AutoConfig.from_pretrained(base_model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base model: {base_model!r} cannot be read: {error}"
        ) from error
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(base_config)
    model = from_pyreft(directory, base, **settings)
    model.peft_config["default"].base_model_name_or_path = base_model
    with new_directory(out) as folder:
        model.save_pretrained(folder)
