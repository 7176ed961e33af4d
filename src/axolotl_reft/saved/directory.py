"""A saved adapter, looked at before any model is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from axolotl_reft.core.tensors import check_intervention, check_lora, check_values
from axolotl_reft.errors import shown
from axolotl_reft.prompts.positions import Positions
from axolotl_reft.settings.components import as_wide_as_the_model
from axolotl_reft.settings.format_version import NewerFormatError
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.peft_type import LOREFT

_KEY = re.compile(r"\.(?P<layer>\d+)\.intv_(?P<part>[01]|lora)\.(?P<name>\w+)$")
# What PEFT's keys begin with.
_BASE = "base_model.model."
# Which axis of each parameter is the hidden size.
_HIDDEN_AXIS = {"rotation": 0, "rotation_base": 0, "weight": 1, "proj_weight": 1}


def read_adapter_config(directory: str, setting: str) -> LoreftConfig:
    """The configuration of a LoReFT adapter, in a directory or on the hub.

    Args:
        directory: path or hub id.
        setting: the YAML key it came from, for the message.

    Raises:
        ValueError: there is no adapter, or one of another method or a newer format.
    """
    try:
        if Path(directory).is_dir() and not (Path(directory) / CONFIG_NAME).is_file():
            # PEFT would ask the hub for a repository of the directory's name.
            raise FileNotFoundError(f"there is no file {CONFIG_NAME}")
        config = PeftConfig.from_pretrained(directory)
        if config.peft_type == LOREFT:
            # Once more: only the method's own class reads strictly.
            config = LoreftConfig.from_pretrained(directory)
    except NewerFormatError as error:
        raise ValueError(f"{setting}: {directory!r}: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{setting}: there is no readable adapter in {directory!r} (looked for "
            "adapter_config.json). Name the directory an earlier run saved to, which "
            f"is its output_dir or a checkpoint-N below it. ({error})"
        ) from error
    if config.peft_type != LOREFT:
        method = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"{setting}: the adapter in {directory!r} is {method}, not "
            "LOREFT; name a directory trained with adapter: loreft, or set the adapter "
            "that it was trained with"
        )
    return config


def check_adapter_fits(
    directory: str, setting: str, hidden_size: int, num_layers: int
) -> LoreftConfig:
    """See that a saved adapter belongs to a base model of this size.

    Raises:
        ValueError: it does not, or :func:`read_adapter_config` refuses it.
    """
    config = read_adapter_config(directory, setting)
    weights = Path(directory) / SAFETENSORS_WEIGHTS_NAME
    if not Path(directory).is_dir():
        return config  # on the hub: PEFT compares when it has fetched the weights
    found_layers, lora_layers, sizes = _sizes(weights, setting)
    if as_wide_as_the_model(config.component) and sizes - {hidden_size}:
        raise ValueError(
            f"{setting}: the adapter in {directory!r} was trained on a base model of "
            f"hidden size {min(sizes - {hidden_size})}, this base has {hidden_size}; "
            "set base_model to the one it was trained on"
        )
    try:
        ranks = config.spec().ranks(num_layers)
    except ValueError as error:
        raise ValueError(
            f"{setting}: the adapter in {directory!r} does not fit this base of "
            f"{num_layers} layers: {error}"
        ) from error
    expected = set(ranks)
    if found_layers != expected:
        raise ValueError(
            f"{setting}: the adapter in {directory!r} holds layers "
            f"{sorted(found_layers)}, but on this base of {num_layers} layers it "
            f"needs {sorted(expected)}; set base_model to the one it was trained on"
        )
    expected = set(range(num_layers)) if config.lora is not None else set()
    if lora_layers != expected:
        raise ValueError(
            f"{setting}: the adapter in {directory!r} holds LoRA in layers "
            f"{sorted(lora_layers)}, but with lora: {config.lora} on this base of "
            f"{num_layers} layers it needs {sorted(expected)}; set base_model to the "
            "one it was trained on"
        )
    _check_numbers(weights, setting, config, ranks)
    return config


@dataclass(frozen=True)
class SavedNumbers:
    """The tensors of a saved adapter.

    Attributes:
        interventions: the state dict of each, by layer and side; side 1 is that of an
            untied suffix.
        lora: the matrices of a LoRA beside them, by their keys.
        others: what else was saved, such as a classifier's head, by its key.
    """

    interventions: dict[tuple[int, int], dict[str, Tensor]]
    lora: dict[str, Tensor]
    others: dict[str, Tensor]


def read_numbers(directory: str, setting: str) -> SavedNumbers:
    """Every tensor of an adapter, in a directory or on the hub.

    Raises:
        ValueError: the weights are missing or damaged, or hold no intervention.
    """
    try:
        tensors = load_peft_weights(directory, device="cpu")
    except Exception as error:  # the hub's and safetensors' own kinds
        raise ValueError(
            f"{setting}: the adapter's weights in {directory!r} are missing or damaged "
            f"({error}); save the adapter again, or name another checkpoint"
        ) from error
    numbers = SavedNumbers({}, {}, {})
    for key, tensor in sorted(tensors.items()):
        match = _KEY.search(key)
        if match is None:
            numbers.others[key] = tensor
            continue
        if match["part"] == "lora":
            numbers.lora[key] = tensor
            continue
        place = (int(match["layer"]), int(match["part"]))
        numbers.interventions.setdefault(place, {})[match["name"]] = tensor
    if not numbers.interventions:
        raise ValueError(
            f"{setting}: the weights in {directory!r} hold no LoReFT intervention; "
            "name the directory that an adapter was saved to"
        )
    return numbers


def _check_numbers(
    weights: Path, setting: str, config: LoreftConfig, ranks: dict[int, int]
) -> None:
    """See that the file has each number of the adapter, and no other."""
    parts = ["0"]
    if Positions.parse(config.positions).two_sided and not config.tied_weights:
        parts.append("1")
    found: dict[tuple[int, str], dict[str, Tensor]] = {
        (layer, part): {} for layer in ranks for part in parts
    }
    try:
        tensors = load_file(weights)
        for key, tensor in tensors.items():
            match = _KEY.search(key)
            if match is not None and key.startswith(_BASE):
                place = int(match["layer"]), match["part"]
                found.setdefault(place, {})[match["name"]] = tensor
            elif "intv_" in key or not key.startswith(_BASE):
                raise ValueError(f"{shown(key)} is no part of a LoReFT adapter")
            else:
                check_values(key, tensor)
        for (layer, part), numbers in found.items():
            where = f"layer {layer}, intv_{part}"
            if part == "lora":
                lora = config.lora or {}
                check_lora(lora["r"], lora["target_modules"], numbers, where)
            elif part not in parts:
                raise ValueError(
                    f"{where} is the suffix's own intervention, which positions: "
                    f"{config.positions} with tied_weights: {config.tied_weights} has "
                    "not"
                )
            else:
                check_intervention(config.intervention, ranks[layer], numbers, where)
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(
            f"{setting}: the adapter's weights {str(weights)!r} are damaged, or not "
            f"those of its adapter_config.json: {error}"
        ) from error


def _sizes(weights: Path, setting: str) -> tuple[set[int], set[int], set[int]]:
    """Numbers of the edited layers and of those with LoRA, and hidden sizes, in an
    adapter's file; no tensor is read."""
    layers: set[int] = set()
    lora_layers: set[int] = set()
    sizes: set[int] = set()
    try:
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                match = _KEY.search(key)
                if match is None:
                    continue
                if match["part"] == "lora":
                    lora_layers.add(int(match["layer"]))
                    continue
                layers.add(int(match["layer"]))
                axis = _HIDDEN_AXIS.get(match["name"])
                shape = file.get_slice(key).get_shape()
                if axis is not None and axis < len(shape):
                    sizes.add(shape[axis])
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{setting}: the adapter's weights {str(weights)!r} are missing or damaged "
            f"({error}); save the adapter again, or name another checkpoint"
        ) from error
    return layers, lora_layers, sizes
