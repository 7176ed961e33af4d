"""Facts about a saved adapter: settings, sizes, subspaces. No model is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from axolotl_reft.exchange.objects import ORTHONORMALITY_TOLERANCE
from axolotl_reft.inspect.subspaces import (
    bases_to_compare,
    orthogonality_error,
    orthonormal_basis,
    projection,
    subspace_overlap,
)
from axolotl_reft.prompts.positions import Positions
from axolotl_reft.saved.directory import read_adapter_config, read_tensors
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.trained_modules import WRAPPED_PARTS


@dataclass
class LayerFacts:
    """Facts about one edited layer.

    Attributes:
        rank: R.
        parameters: trained, of both sides together.
        orthogonality_error: by side, max |R Rᵀ − I|, which is 0 for orthonormal rows;
            of W₂ where there is no R.
        overlap: of the subspaces that prefix and suffix write to, from 0 to 1; None
            where one intervention serves both.
        overlap_with: by side, with the same layer of another adapter.
        edit_size: by side, the mean of ‖Φ(h)−h‖/‖h‖ over the edited tokens of prompts.
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
    """Facts about an adapter.

    Attributes:
        size: width D of the edited hidden states.
        bytes: of all tensors in the file.
        chance: the expected overlap of two random subspaces, R/D.
        trained_whole: parameters of each module in modules_to_save; 0 for a module
            that is tied to another.
        also_saved: modules that were not trained, such as the head of a base whose
            vocabulary had grown.
        training: steps, epochs and losses by the trainer's state, if it was saved.
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
    trained_whole: dict[str, int]
    also_saved: list[str]
    training: dict[str, Any]
    other: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @property
    def all_parameters(self) -> int:
        """The trained parameters of LoReFT, LoRA and whole modules together."""
        return self.parameters + self.lora_parameters + sum(self.trained_whole.values())

    @property
    def has_rotation(self) -> bool:
        """Whether the interventions have an R, and not a free W₂ in its place."""
        return self.settings["intervention"] not in ("noreft", "direft")

    @property
    def orthonormal(self) -> float | None:
        """The largest error of R if it is orthonormal in every layer, or None."""
        largest = max(e for x in self.layers for e in x.orthogonality_error.values())
        fine = self.has_rotation and largest <= ORTHONORMALITY_TOLERANCE
        return largest if fine else None


def inspect_adapter(directory: str, other: str | None = None) -> AdapterFacts:
    """Read an adapter's files and compute its facts.

    Args:
        directory: path or hub id of the adapter.
        other: path or hub id of an adapter to compare subspaces with.

    Raises:
        ValueError: an adapter cannot be read, or the two have no layer in common or
            different hidden sizes.
    """
    config = read_adapter_config(directory, "DIR")
    saved = read_tensors(directory, "DIR")
    states = saved.interventions
    layers = sorted({layer for layer, _ in states})
    projections = {place: projection(state) for place, state in states.items()}
    bases = {place: orthonormal_basis(p_DR) for place, p_DR in projections.items()}
    size, rank = next(iter(bases.values())).shape
    other_bases = bases_to_compare(other, size, set(layers)) if other else {}
    sides = _side_names(config, max(side for _, side in states))

    def layer_facts(layer: int) -> LayerFacts:
        places = {sides[side]: (at, side) for at, side in bases if at == layer}
        first, *second = (bases[place] for place in places.values())
        return LayerFacts(
            layer=layer,
            rank=first.shape[1],
            parameters=sum(_trained(states[place]) for place in places.values()),
            orthogonality_error={
                name: orthogonality_error(projections[place])
                for name, place in places.items()
            },
            overlap=subspace_overlap(first, *second) if second else None,
            overlap_with={
                # A tied adapter has one intervention for both sides.
                name: subspace_overlap(
                    bases[place], other_bases.get(place, other_bases[layer, 0])
                )
                for name, place in places.items()
                if (layer, 0) in other_bases
            },
        )

    whole, also = _other_modules(config, saved.others)
    tensors = [
        tensor
        for state in (*states.values(), saved.lora, saved.others)
        for tensor in state.values()
    ]
    return AdapterFacts(
        directory=directory,
        settings=_settings(config),
        size=size,
        parameters=sum(map(_trained, states.values())),
        lora_parameters=_trained(saved.lora),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        chance=rank / size,
        layers=[layer_facts(layer) for layer in layers],
        trained_whole=whole,
        also_saved=also,
        training=_training(Path(directory)),
        other=other,
    )


def _settings(config: LoreftConfig) -> dict[str, Any]:
    settings = config.to_dict() | {"peft_type": config.peft_type.value}
    return {key: value for key, value in settings.items() if value is not None}


def _side_names(config: LoreftConfig, last_side: int) -> dict[int, str]:
    """Name the tokens that each intervention of a layer edits."""
    positions = Positions.parse(config.positions)
    if last_side == 1:
        return {0: "prefix", 1: "suffix"}
    if positions.everywhere:
        return {0: "all"}
    if positions.two_sided:
        return {0: "both"}
    return {0: "prefix" if positions.first else "suffix"}


def _trained(state: dict[str, Tensor]) -> int:
    """Count trained parameters; a rotation's base is fixed."""
    return sum(t.numel() for name, t in state.items() if name != "rotation_base")


def _other_modules(
    config: LoreftConfig, tensors: dict[str, Tensor]
) -> tuple[dict[str, int], list[str]]:
    """Count the parameters of modules trained whole, and name the untrained ones.

    PEFT writes tied embeddings twice, and once wrote a trained one under two names of
    its wrapper's too.
    """
    whole: dict[str, int] = {}
    counted: list[Tensor] = []
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if any(f".{part}." in key for part in WRAPPED_PARTS):
            continue
        matches = (n for n in config.modules_to_save or () if f"{n}." in key)
        name = next(matches, None)
        if name is None:
            rest[key.removeprefix("base_model.model.").rpartition(".")[0]] = tensor
        else:
            whole[name] = whole.get(name, 0) + tensor.numel()
            counted.append(tensor)
    for name in list(rest):
        same = (t for t in counted if t.dtype == rest[name].dtype)
        if any(torch.equal(rest[name], tensor) for tensor in same):
            whole[name] = 0
            del rest[name]
    return dict(sorted(whole.items())), sorted(rest)


def _training(directory: Path) -> dict[str, Any]:
    """Read steps, epochs and losses from the newest trainer_state.json, if any."""
    checkpoints = directory.glob("checkpoint-*[0-9]/trainer_state.json")
    files = sorted(checkpoints, key=lambda f: int(f.parent.name.rpartition("-")[2]))
    files += directory.glob("trainer_state.json")
    if not files:
        return {}
    state = json.loads(files[-1].read_text())
    facts = {"steps": state["global_step"], "epochs": state["epoch"]}
    for key in ("loss", "eval_loss"):
        values = [entry[key] for entry in state["log_history"] if key in entry]
        if values:
            facts[f"first_{key}"], facts[f"last_{key}"] = values[0], values[-1]
    return facts
