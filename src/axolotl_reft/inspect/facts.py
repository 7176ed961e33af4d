"""What a saved adapter is: its settings, sizes and subspaces. No model is loaded.

Shapes: D hidden size, R rank.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.exchange.objects import ORTHONORMALITY_TOLERANCE
from axolotl_reft.inspect.training_record import training_record
from axolotl_reft.prompts.positions import Positions
from axolotl_reft.saved.directory import read_adapter_config
from axolotl_reft.saved.directory import read_tensors as read_numbers
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.trained_modules import WRAPPED_PARTS

# Those with a free W₂ in the place of R.
WITHOUT_ROTATION = ("noreft", "direft")
# Kept in float64 to be rebuilt, not learned.
_NOT_TRAINED = "rotation_base"


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
        trained_whole: numbers of each module of modules_to_save; 0 for one that shares
            the numbers of another.
        also_saved: modules that were not trained, such as the head of a base whose
            vocabulary had grown.
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
    trained_whole: dict[str, int]
    also_saved: list[str]
    training: dict[str, Any]
    other: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @property
    def all_parameters(self) -> int:
        """What was trained: LoReFT's numbers, LoRA's, and those of whole modules."""
        return self.parameters + self.lora_parameters + sum(self.trained_whole.values())

    @property
    def has_rotation(self) -> bool:
        """Whether there is an R, and not a free W₂ in its place."""
        return self.settings["intervention"] not in WITHOUT_ROTATION

    @property
    def orthonormal(self) -> float | None:
        """The largest error of an R that is orthonormal in every layer; None where it
        is not, or nothing makes it so."""
        largest = max(e for x in self.layers for e in x.orthogonality_error.values())
        fine = self.has_rotation and largest <= ORTHONORMALITY_TOLERANCE
        return largest if fine else None


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
    whole, also = _other_modules(config, numbers.others)
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
        trained_whole=whole,
        also_saved=also,
        training=training_record(directory),
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
    if intervention.kind.has_rotation:
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


def _other_modules(
    config: LoreftConfig, others: dict[str, Tensor]
) -> tuple[dict[str, int], list[str]]:
    """Modules trained whole, with their numbers, and what else was saved.

    PEFT wrote a trained embedding up to three times, under its own name and two of the
    wrapper's; and it writes tied ones twice.
    """
    whole: dict[str, int] = {}
    counted: list[Tensor] = []
    rest: dict[str, Tensor] = {}
    for key, tensor in others.items():
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
        if any(_same(rest[name], tensor) for tensor in counted):
            whole[name] = 0
            del rest[name]
    return dict(sorted(whole.items())), sorted(rest)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _settings(config: LoreftConfig) -> dict[str, Any]:
    settings = config.to_dict()
    settings["peft_type"] = config.peft_type.value
    return {key: value for key, value in settings.items() if value is not None}
