"""What a saved adapter is: its settings, sizes and subspaces. No model is loaded.

Shapes: D hidden size, R rank.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from axolotl_reft.adapter_directory import read_adapter_config, read_numbers
from axolotl_reft.config import LoreftConfig
from axolotl_reft.interventions import INTERVENTION_CLASSES
from axolotl_reft.positions import Positions

# Those with a free W₂ in the place of R.
WITHOUT_ROTATION = ("noreft", "direft")
# Kept in float64 to be rebuilt, not learned.
_NOT_TRAINED = "rotation_base"
# What of an axolotl config says how an adapter was trained.
_TRAINING_KEYS = (
    "datasets",
    "learning_rate",
    "lr_scheduler",
    "num_epochs",
    "max_steps",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "sequence_len",
    "sample_packing",
    "optimizer",
    "weight_decay",
    "warmup_ratio",
    "warmup_steps",
    "seed",
)


@dataclass
class LayerFacts:
    """One edited layer.

    Attributes:
        rank: R.
        parameters: trained numbers, of both sides.
        orthogonality_error: by side, max |R Rᵀ − I|, which is 0 for orthonormal rows;
            of W₂ where the intervention has a free one.
        overlap: of the subspaces that prefix and suffix write to, from 0 to 1; None
            where one intervention serves both.
        overlap_with: by side, with the same layer of another adapter.
        edit_size: by side, the mean of ‖Φ(h)−h‖/‖h‖ over edited tokens.
    """

    layer: int
    rank: int
    parameters: int
    orthogonality_error: dict[str, float]
    overlap: float | None = None
    overlap_with: dict[str, float] = field(default_factory=dict)
    edit_size: dict[str, float] = field(default_factory=dict)


@dataclass
class AdapterFacts:
    """An adapter, as :func:`inspect_adapter` finds it.

    Attributes:
        size: of what is edited, D.
        bytes: of all tensors in the file.
        chance: the overlap to expect of two random subspaces, R/D.
        training: steps, epochs and losses, and settings of axolotl's config, as far as
            they lie beside the adapter.
        other: the adapter that ``overlap_with`` compares with.
    """

    directory: str
    settings: dict[str, Any]
    size: int
    parameters: int
    lora_parameters: int
    bytes: int
    chance: float
    layers: list[LayerFacts]
    modules_to_save: list[str]
    training: dict[str, Any]
    other: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def inspect_adapter(directory: str, other: str | None = None) -> AdapterFacts:
    """Everything that an adapter's files say.

    Args:
        directory: path or hub id of the adapter.
        other: another one, to compare subspaces with.

    Raises:
        ValueError: an adapter cannot be read, or the two have no layer in common or
            different hidden sizes.
    """
    config = read_adapter_config(directory, "DIR")
    numbers = read_numbers(directory, "DIR")
    bases = _write_bases(config, numbers.interventions)
    sides = _side_names(config, max(side for _, side in bases))
    size, rank = next(iter(bases.values())).shape
    facts = AdapterFacts(
        directory=directory,
        settings=_settings(config),
        size=size,
        parameters=sum(map(_count, numbers.interventions.values())),
        lora_parameters=_count(numbers.lora),
        bytes=sum(
            tensor.numel() * tensor.element_size()
            for state in (
                *numbers.interventions.values(),
                numbers.lora,
                numbers.others,
            )
            for tensor in state.values()
        ),
        chance=rank / size,
        layers=[],
        modules_to_save=sorted(
            {key.removeprefix("base_model.model.") for key in numbers.others}
        ),
        training=_training(directory),
        other=other,
    )
    others = _other_bases(other, size, {layer for layer, _ in bases}) if other else {}
    for layer in sorted({layer for layer, _ in bases}):
        own = {side: basis for (at, side), basis in bases.items() if at == layer}
        states = [numbers.interventions[layer, side] for side in own]
        facts.layers.append(
            LayerFacts(
                layer=layer,
                rank=own[0].shape[1],
                parameters=sum(map(_count, states)),
                orthogonality_error={
                    sides[side]: _orthogonality_error(config, state)
                    for side, state in zip(own, states, strict=True)
                },
                overlap=subspace_overlap(own[0], own[1]) if len(own) == 2 else None,
                overlap_with={
                    sides[side]: subspace_overlap(
                        basis, others.get((layer, side), others[layer, 0])
                    )
                    for side, basis in own.items()
                    if (layer, 0) in others
                },
            )
        )
    return facts


def subspace_overlap(a_DR: Tensor, b_DR: Tensor) -> float:
    """The mean squared cosine of the angles between two subspaces.

    ‖AᵀB‖²/min(R_A, R_B) for orthonormal columns (Hu et al., arXiv 2106.09685, section
    7.2): 1 where one contains the other, 0 where they are orthogonal, about R/D by
    chance.
    """
    smaller = min(a_DR.shape[1], b_DR.shape[1])
    return float((a_DR.T @ b_DR).square().sum() / smaller)


def _intervention(config: LoreftConfig, state: dict[str, Tensor]) -> Any:
    key, axis = ("rotation", 0) if "rotation" in state else ("proj_weight", 1)
    intervention = INTERVENTION_CLASSES[config.intervention](
        embed_dim=state[key].shape[axis],
        low_rank_dimension=state[key].shape[1 - axis],
        act_fn=config.act_fn,
    )
    intervention.load_state_dict(state)
    return intervention.requires_grad_(False)


def _written(config: LoreftConfig, state: dict[str, Tensor]) -> Tensor:
    """(D, R): the directions an intervention writes to, as columns."""
    intervention = _intervention(config, state)
    if hasattr(intervention, "rotation_matrix"):
        return intervention.rotation_matrix()
    return intervention.proj_weight.T


def _write_bases(
    config: LoreftConfig, states: dict[tuple[int, int], dict[str, Tensor]]
) -> dict[tuple[int, int], Tensor]:
    """The same, made orthonormal."""
    return {
        place: torch.linalg.qr(_written(config, state)).Q
        for place, state in states.items()
    }


def _other_bases(
    directory: str, size: int, layers: set[int]
) -> dict[tuple[int, int], Tensor]:
    config = read_adapter_config(directory, "--with")
    bases = _write_bases(config, read_numbers(directory, "--with").interventions)
    found = next(iter(bases.values())).shape[0]
    if found != size:
        raise ValueError(
            f"--with: the adapter in {directory!r} edits vectors of size {found}, the "
            f"other one of {size}; compare adapters of one base model"
        )
    if not layers & {layer for layer, _ in bases}:
        raise ValueError(
            f"--with: the adapter in {directory!r} edits layers "
            f"{sorted({layer for layer, _ in bases})} and the other one "
            f"{sorted(layers)}; there is no layer to compare"
        )
    return bases


def _side_names(config: LoreftConfig, last_side: int) -> dict[int, str]:
    """What each intervention of a layer edits."""
    positions = Positions.parse(config.positions)
    if last_side == 1:
        return {0: "prefix", 1: "suffix"}
    if positions.everywhere:
        return {0: "all"}
    if positions.two_sided:
        return {0: "both"}
    return {0: "prefix" if positions.first else "suffix"}


def _orthogonality_error(config: LoreftConfig, state: dict[str, Tensor]) -> float:
    r_DR = _written(config, state).double()
    identity = torch.eye(r_DR.shape[1], dtype=r_DR.dtype)
    return float((r_DR.T @ r_DR - identity).abs().max())


def _count(state: dict[str, Tensor]) -> int:
    return sum(t.numel() for name, t in state.items() if name != _NOT_TRAINED)


def _settings(config: LoreftConfig) -> dict[str, Any]:
    settings = config.to_dict()
    settings["peft_type"] = config.peft_type.value
    return {key: value for key, value in settings.items() if value is not None}


def _training(directory: str) -> dict[str, Any]:
    """How it was trained, by the trainer's state and axolotl's model card."""
    here = Path(directory)
    if not here.is_dir():
        return {}
    facts: dict[str, Any] = {}
    states = [here / "trainer_state.json", *_by_step(here)]
    state_file = next((file for file in states if file.is_file()), None)
    if state_file:
        facts |= _from_state(state_file)
    for card in (here / "README.md", here.parent / "README.md"):
        settings = _from_card(card)
        if settings:
            facts["settings"] = settings
            break
    return facts


def _by_step(directory: Path) -> list[Path]:
    """The checkpoints' states, the last one first."""
    found = directory.glob("checkpoint-*/trainer_state.json")
    return sorted(found, key=lambda file: _number(file.parent.name), reverse=True)


def _number(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def _from_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text())
        history = state["log_history"]
    except (ValueError, KeyError, TypeError):
        return {}
    facts = {"steps": state.get("global_step"), "epochs": state.get("epoch")}
    for key in ("loss", "eval_loss"):
        values = [entry[key] for entry in history if key in entry]
        if values:
            facts[f"first_{key}"], facts[f"last_{key}"] = values[0], values[-1]
    return facts


def _from_card(card: Path) -> dict[str, Any]:
    """The settings in the axolotl config that axolotl writes into a model card."""
    if not card.is_file():
        return {}
    match = re.search(
        r"axolotl version: .*?```yaml\n(.*?)\n```", card.read_text(), re.DOTALL
    )
    try:
        config = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    if not isinstance(config, dict):
        return {}
    return {key: config[key] for key in _TRAINING_KEYS if key in config}
