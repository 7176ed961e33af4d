"""Saved adapters, read and checked before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors.torch import load_file
from torch import Tensor

from axolotl_reft.core.tensors import check_tensors, check_values, parse_saved_key
from axolotl_reft.settings.components import as_wide_as_the_model
from axolotl_reft.tuner.config import LOREFT, LoreftConfig

_REMEDY = "set base_model to the one it was trained on"


def read_adapter_config(directory: str, setting: str) -> LoreftConfig:
    """Read the configuration of a LoReFT adapter, in a directory or on the hub;
    ValueError, which begins with ``setting``, if there is none that can be read."""
    try:
        if Path(directory).is_dir() and not (Path(directory) / CONFIG_NAME).is_file():
            # PEFT would ask the hub for a repository of the directory's name.
            raise FileNotFoundError(f"there is no file {CONFIG_NAME}")
        config = LoreftConfig.from_pretrained(directory)
    except Exception as error:
        raise ValueError(
            f"{setting}: there is no readable adapter in {directory!r}; name a run's "
            f"output_dir or a checkpoint-N below it ({error})"
        ) from error
    if config.peft_type != LOREFT:
        raise ValueError(
            f"{setting}: the adapter in {directory!r} is {config.peft_type.value}, not "
            "LOREFT; name one that was trained with adapter: loreft"
        )
    return config


@dataclass
class SavedTensors:
    """The tensors of a saved adapter.

    Attributes:
        layers: path of the base model's list of layers.
        interventions: state dicts by layer and side, 1 being that of an untied suffix.
        lora: the matrices of a LoRA beside them, by key.
        others: what else was saved, such as a classifier's head, by key.
    """

    layers: str
    interventions: dict[tuple[int, int], dict[str, Tensor]]
    lora: dict[str, Tensor]
    others: dict[str, Tensor]


def read_tensors(directory: str, setting: str) -> SavedTensors:
    """Read every tensor of an adapter, in a directory or on the hub; ValueError if they
    are missing or damaged, or hold no intervention."""
    try:
        if Path(directory).is_dir():
            tensors = load_file(Path(directory) / SAFETENSORS_WEIGHTS_NAME)
        else:
            tensors = load_peft_weights(directory, device="cpu")
    except Exception as error:  # the hub's and safetensors' own kinds
        raise ValueError(
            f"{setting}: the weights in {directory!r} are missing or damaged "
            f"({error}); save the adapter again, or name another checkpoint"
        ) from error
    saved = SavedTensors("", {}, {}, {})
    for key, tensor in sorted(tensors.items()):
        parsed = parse_saved_key(key)
        if parsed is None:
            saved.others[key] = tensor
        elif parsed.side is None:
            saved.lora[key] = tensor
        else:
            saved.layers = parsed.layers
            state = saved.interventions.setdefault((parsed.layer, parsed.side), {})
            state[parsed.tensor] = tensor
    if not saved.interventions:
        raise ValueError(
            f"{setting}: the weights in {directory!r} hold no LoReFT intervention"
        )
    return saved


def check_adapter_fits(
    directory: str, setting: str, hidden_size: int, num_layers: int
) -> LoreftConfig:
    """Raise ValueError if a saved adapter is damaged, or of a base of another size.

    Of an adapter on the hub only the configuration is checked: PEFT compares the
    tensors once it has fetched them.
    """
    config = read_adapter_config(directory, setting)
    if not Path(directory).is_dir():
        return config
    saved = read_tensors(directory, setting)
    try:
        _check_interventions(config, hidden_size, num_layers, saved)
        _check_lora(config, num_layers, saved)
        for key, tensor in saved.others.items():
            check_values(key, tensor, SAFETENSORS_WEIGHTS_NAME)
    except ValueError as error:
        raise ValueError(f"{setting}: {directory!r}: {error}") from error
    return config


def _check_interventions(
    config: LoreftConfig, hidden_size: int, num_layers: int, saved: SavedTensors
) -> None:
    spec = config.spec()
    ranks = spec.ranks(num_layers)
    found = sorted({layer for layer, _ in saved.interventions})
    if found != sorted(ranks):
        raise ValueError(
            f"the adapter holds layers {found}, but on this base of {num_layers} "
            f"layers it needs {sorted(ranks)}; {_REMEDY}"
        )
    for layer, rank in ranks.items():
        for side in (0, 1):
            state = saved.interventions.get((layer, side), {})
            width, _ = spec.kind.sizes(state)
            if width not in (0, hidden_size) and as_wide_as_the_model(spec.component):
                raise ValueError(
                    f"the adapter was trained on a base model of hidden size {width}, "
                    f"this base has {hidden_size}; {_REMEDY}"
                )
            shapes = spec.kind.expected_shapes(width or hidden_size, rank)
            name = f"layers.{layer}.intv_{side}"
            check_tensors(
                {f"{name}.{key}": tensor for key, tensor in state.items()},
                {f"{name}.{key}": shapes[key] for key in shapes if side < spec.sides},
                SAFETENSORS_WEIGHTS_NAME,
            )


def _check_lora(config: LoreftConfig, num_layers: int, saved: SavedTensors) -> None:
    """Check a LoRA's matrices A (r, in) and B (out, r); the base tells in and out."""
    modules: dict[str, set[str]] = {}
    for key in saved.lora:
        layer, _, name = key.rpartition(".")
        modules.setdefault(layer, set()).add(name[: -len("_A")])
    found = sorted(int(layer.split(".")[-2]) for layer in modules)
    needed = list(range(num_layers)) if config.lora else []
    if found != needed:
        raise ValueError(
            f"the adapter holds LoRA in layers {found}, but with lora: {config.lora} "
            f"on this base of {num_layers} layers it needs {needed}; {_REMEDY}"
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
            a, b = (f"{layer}.{name}_{matrix}" for matrix in "AB")
            expected[a] = (r, saved.lora[a].shape[-1] if a in saved.lora else 0)
            expected[b] = (saved.lora[b].shape[0] if b in saved.lora else 0, r)
    check_tensors(saved.lora, expected, SAFETENSORS_WEIGHTS_NAME)
