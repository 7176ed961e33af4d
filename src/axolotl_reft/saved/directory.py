"""Saved adapters, read and checked before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors.torch import load_file
from torch import Tensor

from axolotl_reft.core.kinds import KINDS
from axolotl_reft.core.tensors import check_tensors, check_values, parse_saved_key
from axolotl_reft.prompts.positions import Positions
from axolotl_reft.settings.components import as_wide_as_the_model
from axolotl_reft.settings.format_version import NewerFormatError
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.peft_type import LOREFT

_REMEDY = "set base_model to the one it was trained on"


def read_adapter_config(directory: str, setting: str) -> LoreftConfig:
    """Read the configuration of a LoReFT adapter, in a directory or on the hub.

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


@dataclass(frozen=True)
class SavedTensors:
    """The tensors of a saved adapter.

    Attributes:
        file: where they are from, for messages.
        layers: path of the base model's list of layers.
        interventions: the state dict of each, by layer and side; side 1 is that of an
            untied suffix.
        lora: the matrices of a LoRA beside them, by their keys.
        others: what else was saved, such as a classifier's head, by its key.
    """

    file: str
    layers: str = ""
    interventions: dict[tuple[int, int], dict[str, Tensor]] = field(
        default_factory=dict
    )
    lora: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)


def read_tensors(directory: str, setting: str) -> SavedTensors:
    """Read every tensor of an adapter, in a directory or on the hub.

    Raises:
        ValueError: the weights are missing or damaged, or hold no intervention.
    """
    file, local = directory, Path(directory).is_dir()
    if local:
        file = str(Path(directory) / SAFETENSORS_WEIGHTS_NAME)
    try:
        tensors = load_file(file) if local else load_peft_weights(file, device="cpu")
    except Exception as error:  # the hub's and safetensors' own kinds
        raise ValueError(
            f"{setting}: the adapter's weights {file!r} are missing or damaged "
            f"({error}); save the adapter again, or name another checkpoint"
        ) from error
    keys = {key: parse_saved_key(key) for key in sorted(tensors)}
    layers = next((parsed.layers for parsed in keys.values() if parsed), "")
    saved = SavedTensors(file, layers)
    for key, parsed in keys.items():
        if parsed is None:
            saved.others[key] = tensors[key]
        elif parsed.side is None:
            saved.lora[key] = tensors[key]
        else:
            state = saved.interventions.setdefault((parsed.layer, parsed.side), {})
            state[parsed.tensor] = tensors[key]
    if not saved.interventions:
        raise ValueError(
            f"{setting}: the weights in {directory!r} hold no LoReFT intervention; "
            "name the directory that an adapter was saved to"
        )
    return saved


def check_adapter_fits(
    directory: str, setting: str, hidden_size: int, num_layers: int
) -> LoreftConfig:
    """Check that a saved adapter belongs to a base model of this size.

    An adapter on the hub has its configuration checked alone: PEFT compares the tensors
    once it has fetched them.

    Raises:
        ValueError: it does not, or its files are damaged.
    """
    config = read_adapter_config(directory, setting)
    if not Path(directory).is_dir():
        return config
    saved = read_tensors(directory, setting)
    try:
        _check_width(config, hidden_size, saved)
        _check_interventions(config, hidden_size, num_layers, saved)
        _check_lora(config, num_layers, saved)
        for key, tensor in saved.others.items():
            check_values(key, tensor, saved.file)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
    return config


def _check_width(config: LoreftConfig, hidden_size: int, saved: SavedTensors) -> None:
    if not as_wide_as_the_model(config.component):
        return
    for tensors in saved.interventions.values():
        width, _ = KINDS[config.intervention].sizes(tensors)
        if width not in (0, hidden_size):
            raise ValueError(
                f"the adapter in {saved.file!r} was trained on a base model of hidden "
                f"size {width}, this base has {hidden_size}; {_REMEDY}"
            )


def _check_interventions(
    config: LoreftConfig, hidden_size: int, num_layers: int, saved: SavedTensors
) -> None:
    try:
        ranks = config.spec().ranks(num_layers)
    except ValueError as error:
        raise ValueError(
            f"the adapter in {saved.file!r} does not fit this base of {num_layers} "
            f"layers: {error}"
        ) from error
    found = sorted({layer for layer, _ in saved.interventions})
    if found != sorted(ranks):
        raise ValueError(
            f"the adapter in {saved.file!r} holds layers {found}, but on this base of "
            f"{num_layers} layers it needs {sorted(ranks)}; {_REMEDY}"
        )
    kind = KINDS[config.intervention]
    untied = Positions.parse(config.positions).two_sided and not config.tied_weights
    expected = {}
    for layer, rank in ranks.items():
        for side in (0, 1) if untied else (0,):
            width, _ = kind.sizes(saved.interventions.get((layer, side), {}))
            for name, shape in kind.expected_shapes(width or hidden_size, rank).items():
                expected[f"layers.{layer}.intv_{side}.{name}"] = shape
    tensors = {
        f"layers.{layer}.intv_{side}.{name}": tensor
        for (layer, side), state in saved.interventions.items()
        for name, tensor in state.items()
    }
    check_tensors(tensors, expected, saved.file)


def _check_lora(config: LoreftConfig, num_layers: int, saved: SavedTensors) -> None:
    """Check a LoRA's matrices A (r, in) and B (out, r); the base tells in and out."""
    tensors = {}
    modules: dict[int, set[str]] = {}
    for key, tensor in saved.lora.items():
        parsed = parse_saved_key(key)
        assert parsed is not None, "read_tensors parsed it"
        tensors[f"layers.{parsed.layer}.intv_lora.{parsed.tensor}"] = tensor
        modules.setdefault(parsed.layer, set()).add(parsed.tensor[: -len("_A")])
    needed = list(range(num_layers)) if config.lora else []
    if sorted(modules) != needed:
        raise ValueError(
            f"the adapter in {saved.file!r} holds LoRA in layers {sorted(modules)}, "
            f"but with lora: {config.lora} on this base of {num_layers} layers it "
            f"needs {needed}; {_REMEDY}"
        )
    if config.lora is None:
        return
    r, targets = config.lora["r"], config.lora["target_modules"]
    expected = {}
    for layer, names in modules.items():
        # all-linear depends on the base.
        for target in [] if isinstance(targets, str) else targets:
            module = target.replace(".", "_")
            if not any(f"_{name}".endswith(f"_{module}") for name in names):
                names.add(module)
        for name in names:
            a, b = (f"layers.{layer}.intv_lora.{name}_{matrix}" for matrix in "AB")
            expected[a] = (r, tensors[a].shape[-1] if a in tensors else 0)
            expected[b] = (tensors[b].shape[0] if b in tensors else 0, r)
    check_tensors(tensors, expected, saved.file)
