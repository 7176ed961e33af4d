"""Facts about a saved adapter: settings, sizes, subspaces. No model is loaded.

Shapes: D hidden size, R rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from axolotl_reft.core.kinds import KINDS
from axolotl_reft.core.rotation import ORTHONORMALITY_TOLERANCE, rotation
from axolotl_reft.saved.directory import read_adapter_config, read_tensors
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.trained_modules import WRAPPED_PARTS


class Quantity(NamedTuple):
    """A quantity of the layers: the lines of a plot, the columns of a table.

    Attributes:
        lines: by label, the values by layer.
        limits: of the plot's axis, which is logarithmic from above 0.
    """

    name: str
    title: str
    lines: dict[str, dict[int, float]]
    limits: tuple[float, float | None]


@dataclass
class LayerFacts:
    """Facts about one edited layer; the dictionaries are by side.

    Attributes:
        parameters: trained, of both sides together.
        orthogonality_error: max |R Rᵀ − I|, of W₂ where there is no R.
        overlap: of the subspaces that prefix and suffix write to; None where one
            intervention serves both.
        overlap_with: with the same layer of another adapter.
        edit_size: the mean of ‖Φ(h)−h‖/‖h‖ over the edited tokens of prompts.
    """

    layer: int
    rank: int
    parameters: int = 0
    orthogonality_error: dict[str, float] = field(default_factory=dict)
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
        trained_whole: parameters of each module in modules_to_save, 0 for a tied one.
        also_saved: untrained modules, such as a head whose vocabulary had grown.
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

    @property
    def all_parameters(self) -> int:
        """The trained parameters of LoReFT, LoRA and whole modules together."""
        return self.parameters + self.lora_parameters + sum(self.trained_whole.values())

    @property
    def layer_count(self) -> str:
        """``3 layers``, or ``1 layer``."""
        return f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''}"

    @property
    def has_rotation(self) -> bool:
        """Whether the interventions have an R, and not a free W₂ in its place."""
        return KINDS[self.settings["intervention"]].has_rotation

    @property
    def orthonormal(self) -> float | None:
        """The largest error of R if it is orthonormal in every layer, or None."""
        largest = max(e for x in self.layers for e in x.orthogonality_error.values())
        fine = self.has_rotation and largest <= ORTHONORMALITY_TOLERANCE
        return largest if fine else None

    def quantities(self) -> list[Quantity]:
        """Return what there is to see of the layers."""
        limits: tuple[float, float | None]
        title = "Overlap of the subspaces written to: 1 the same, 0 orthogonal, "
        title += f"{self.chance:.2g} by chance"
        overlaps = self._by_side("overlap_with", "with other, ")
        if self.layers[0].overlap is not None:
            overlaps["prefix/suffix"] = {x.layer: x.overlap or 0 for x in self.layers}
        found = [Quantity("overlap", title, overlaps, (0, 1.05))] if overlaps else []
        if sizes := self._by_side("edit_size"):
            title = "Size of the edit: mean ‖Φ(h)−h‖/‖h‖ of the prompts' edited tokens"
            found.append(Quantity("edit", title, sizes, (0, None)))
        # An orthonormal R is shown only where there is nothing else to see.
        if self.orthonormal is None or not found:
            name, aim, limits = "R", "should be 0", (1e-9, 1)
            if not self.has_rotation:
                name, aim, limits = "W₂", "need not be 0", (0, None)
            title = f"Distance of {name} from orthonormal rows ({aim})"
            errors = self._by_side("orthogonality_error")
            found.append(Quantity(f"{name} error", title, errors, limits))
        return found

    def _by_side(self, name: str, prefix: str = "") -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {}
        for layer in self.layers:
            for side, value in getattr(layer, name).items():
                found.setdefault(f"{prefix}{side}", {})[layer.layer] = value
        return found


def inspect_adapter(directory: str, other: str | None = None) -> AdapterFacts:
    """Read the facts of an adapter, and its subspaces' overlap with another one's.

    Args:
        directory, other: paths or hub ids.

    Raises:
        ValueError: an adapter cannot be read, or the two have no layer in common or
            different hidden sizes.
    """
    config = read_adapter_config(directory, "DIR")
    saved = read_tensors(directory, "DIR")
    states = dict(sorted(saved.interventions.items()))
    bases, other_bases = _bases(states), {}
    size = next(iter(bases.values())).shape[0]
    if other:
        read_adapter_config(other, "--with")
        other_bases = _bases(read_tensors(other, "--with").interventions)
        other_size = next(iter(other_bases.values())).shape[0]
        if other_size != size or not bases.keys() & other_bases.keys():
            raise ValueError(
                f"--with: the adapter in {other!r} edits vectors of size {other_size} "
                f"in layers {sorted({layer for layer, _ in other_bases})}; compare "
                "adapters of one base model with a layer in common"
            )
    names = _side_names(config.positions, untied=any(side for _, side in states))
    layers: dict[int, LayerFacts] = {}
    for (number, side), state in states.items():
        p_DR, basis_DR = _projection(state).double(), bases[number, side]
        rank = p_DR.shape[1]
        facts = layers.setdefault(number, LayerFacts(number, rank))
        facts.parameters += _trained(state)
        error_RR = p_DR.T @ p_DR - torch.eye(rank)
        facts.orthogonality_error[names[side]] = float(error_RR.abs().max())
        if side == 1:
            facts.overlap = subspace_overlap(bases[number, 0], basis_DR)
        if (number, 0) in other_bases:
            # A tied adapter has one intervention for both sides.
            other_DR = other_bases.get((number, side), other_bases[number, 0])
            facts.overlap_with[names[side]] = subspace_overlap(basis_DR, other_DR)
    whole, also = _other_modules(config, saved.others)
    settings = config.to_dict() | {"peft_type": config.peft_type.value}
    groups = (*states.values(), saved.lora, saved.others)
    return AdapterFacts(
        directory=directory,
        settings={key: value for key, value in settings.items() if value is not None},
        size=size,
        parameters=sum(facts.parameters for facts in layers.values()),
        lora_parameters=_trained(saved.lora),
        bytes=sum(t.nbytes for group in groups for t in group.values()),
        chance=next(iter(layers.values())).rank / size,
        layers=list(layers.values()),
        trained_whole=whole,
        also_saved=also,
        training=_training(Path(directory)),
        other=other,
    )


def trained_parameters(directory: str) -> int:
    """Count an adapter's trained parameters, LoRA and whole modules among them;
    ValueError if it cannot be read."""
    config = read_adapter_config(directory, "DIR")
    saved = read_tensors(directory, "DIR")
    whole, _ = _other_modules(config, saved.others)
    states = (*saved.interventions.values(), saved.lora)
    return sum(map(_trained, states)) + sum(whole.values())


def _projection(state: dict[str, Tensor]) -> Tensor:
    """Return Pᵀ (D, R) of an intervention's tensors: R transposed, or a free W₂."""
    if "rotation" in state:
        return rotation(state["rotation"].float(), state["rotation_base"])
    return state["proj_weight"].float().T


def _bases(
    states: dict[tuple[int, int], dict[str, Tensor]],
) -> dict[tuple[int, int], Tensor]:
    """Return orthonormal bases (D, R) of what is written to, by layer and side."""
    return {place: torch.linalg.qr(_projection(s)).Q for place, s in states.items()}


def subspace_overlap(a_DR: Tensor, b_DR: Tensor) -> float:
    """Return the mean squared cosine of the angles between two subspaces.

    ‖AᵀB‖²/min(R_A, R_B) for orthonormal columns (Hu et al., arXiv 2106.09685, section
    7.2): 1 where one contains the other, 0 where they are orthogonal, about R/D by
    chance.
    """
    smaller = min(a_DR.shape[1], b_DR.shape[1])
    return float((a_DR.T @ b_DR).square().sum() / smaller)


def _side_names(positions: str, untied: bool) -> tuple[str, ...]:
    """Name the tokens that each intervention of a layer edits."""
    if "+" in positions:
        return ("prefix", "suffix") if untied else ("both",)
    return ({"f": "prefix", "l": "suffix", "a": "all"}[positions[0]],)


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
    trained, rest = [], {}
    for key, tensor in tensors.items():
        if any(f".{part}." in key for part in WRAPPED_PARTS):
            continue
        names = [n for n in config.modules_to_save or () if f"{n}." in key]
        if names:
            whole[names[0]] = whole.get(names[0], 0) + tensor.numel()
            trained.append(tensor)
        else:
            rest[key.removeprefix("base_model.model.").rpartition(".")[0]] = tensor
    for name, tensor in rest.items():
        if any(t.dtype == tensor.dtype and torch.equal(t, tensor) for t in trained):
            whole[name] = 0
    return dict(sorted(whole.items())), sorted(rest.keys() - whole.keys())


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
