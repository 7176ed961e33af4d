"""The settings of an adapter, checked and parsed once, free of PEFT and of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.activations import ACT2FN

from axolotl_reft.core.kinds import KINDS, InterventionKind
from axolotl_reft.errors import did_you_mean, shown
from axolotl_reft.prompts.positions import Positions
from axolotl_reft.prompts.turns import Turns
from axolotl_reft.settings.components import COMPONENTS, component_layer, is_component
from axolotl_reft.settings.foreign_names import intervention_hint
from axolotl_reft.settings.layers import (
    LARGEST,
    edited_layers,
    layer_ranks,
    parse_layers,
)

INTERVENTIONS = tuple(KINDS)


@dataclass(frozen=True)
class AdapterSpec:
    """Which tokens an adapter edits in which layers, and how.

    Attributes:
        layers, rank: as written; :meth:`ranks` resolves them for a model.
        tied: prefix and suffix have one intervention.
        component: the edited module of a layer and its side.
    """

    layers: Any
    rank: Any
    positions: Positions
    turns: Turns
    tied: bool
    kind: InterventionKind
    component: str
    dropout: float
    act_fn: str | None

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> AdapterSpec:
        """Read the settings of ``adapter_config.json`` or of the YAML block.

        Raises:
            ValueError: a value is out of its range; the message says what was got and
                what to write instead.
        """
        parse_layers(settings["layers"])
        positions = Positions.parse(settings["positions"])
        turns = Turns.parse(settings["turns"], settings.get("turn_markers"))
        rank = settings["rank"]
        if isinstance(rank, dict):
            # As JSON would have it, so that a reloaded configuration is the same.
            rank = _by_written_layers(rank)
        _check_rank(rank)
        tied = settings["tied_weights"]
        if type(tied) is not bool:
            raise ValueError(f"tied_weights: {shown(tied)} is neither true nor false")
        kind = _checked_kind(settings["intervention"])
        _check_component(settings["component"], settings["layers"])
        _check_dropout(settings["dropout"], kind)
        _check_act_fn(settings["act_fn"], kind)
        return cls(
            settings["layers"],
            rank,
            positions,
            turns,
            tied or not positions.two_sided,
            kind,
            settings["component"],
            settings["dropout"],
            settings["act_fn"],
        )

    def ranks(self, count: int) -> dict[int, int]:
        """Return the rank of each edited layer in a model of ``count`` layers.

        Raises:
            ValueError: a layer is outside the model, or the mapping of ranks and the
                edited layers do not agree.
        """
        return layer_ranks(self.rank, self.layers, self.component, count)

    def edited_layers(self, count: int) -> list[int]:
        """Return the layers that are edited in a model of ``count`` layers, sorted."""
        return edited_layers(self.layers, self.component, count)

    @property
    def sides(self) -> int:
        """The number of interventions of a layer: two for untied prefix and suffix."""
        return 1 if self.tied else 2


def _by_written_layers(ranks: dict[Any, Any]) -> dict[str | int, Any]:
    """Return the mapping with every key as text."""
    written: dict[str | int, Any] = {}
    for layers, rank in ranks.items():
        parse_layers(layers, "rank")
        if str(layers) in written:
            raise ValueError(
                f"rank: {layers} has two ranks, as a number and as text; give it one"
            )
        written[str(layers)] = rank
    return written


def _check_rank(rank: object) -> None:
    ranks = list(rank.values()) if isinstance(rank, dict) else [rank]
    for value in ranks:
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise ValueError(
                f"rank: {shown(value)} is not a whole number of at least 1 and at most "
                "the hidden size; the paper uses 4 to 8. Ranks by layer are a mapping, "
                "for example {0-15: 4, all: 8}"
            )
    if not ranks:
        raise ValueError("rank: the mapping of layers to ranks is empty; write rank: 8")


def _checked_kind(intervention: object) -> InterventionKind:
    if isinstance(intervention, str) and intervention in KINDS:
        return KINDS[intervention]
    raise ValueError(
        f"intervention: {shown(intervention)} is unknown."
        f"{intervention_hint(intervention, INTERVENTIONS)} Choose one of: "
        f"{', '.join(INTERVENTIONS)}; classes of your own cannot be used"
    )


def _check_component(component: object, layers: object) -> None:
    if isinstance(component, (list, tuple)):
        raise ValueError(
            f"component: {shown(component)} is a list, and an adapter edits one "
            "component. For several, train an adapter for each, and make them active "
            "together: model.base_model.set_adapter([...])"
        )
    if isinstance(component, str) and component.startswith("head_"):
        raise ValueError(
            f"component: {shown(component)}: pyreft's components of single heads are "
            "not supported; attention_value_output holds all heads"
        )
    if not is_component(component):
        raise ValueError(
            f"component: {shown(component)} is unknown."
            f"{did_you_mean(component, COMPONENTS)} Choose one of: "
            f"{', '.join(COMPONENTS)}; or name a module of the layer and its side by "
            "path, such as mlp.down_proj.output"
        )
    if component_layer(str(component)) is not None and layers != "all":
        raise ValueError(
            f"component: {shown(component)} names its layer, and layers: "
            f"{shown(layers)} does too; leave out layers, or write the path "
            "within the layer"
        )


def check_probability(setting: str, value: object) -> None:
    """See that a dropout is a number from 0 to below 1.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{setting}: {shown(value)} is not a number from 0 to below 1")
    if not 0 <= value < 1:
        raise ValueError(f"{setting}: {shown(value)} is not from 0 to below 1")


def _check_dropout(dropout: Any, kind: InterventionKind) -> None:
    check_probability("dropout", dropout)
    if dropout and not kind.takes_dropout:
        raise ValueError(
            f"dropout: {shown(dropout)} would have no effect, {kind.name} has no "
            "dropout in pyreft; set dropout: 0.0"
        )


def _check_act_fn(act_fn: object, kind: InterventionKind) -> None:
    if act_fn is None:
        return
    if not isinstance(act_fn, str) or act_fn not in ACT2FN:
        raise ValueError(
            f"act_fn: {shown(act_fn)} is unknown.{did_you_mean(act_fn, tuple(ACT2FN))} "
            f"Choose one of: {', '.join(ACT2FN)}; or null, which is linear"
        )
    if not kind.has_weight:
        raise ValueError(
            f"act_fn: {shown(act_fn)} would have no effect, {kind.name} has no Wh "
            "to apply it to; set act_fn: null"
        )
    if list(ACT2FN[act_fn].parameters()):
        raise ValueError(
            f"act_fn: {shown(act_fn)} has parameters of its own, which an adapter "
            "would not train; choose one without, such as gelu, relu, silu or tanh"
        )
