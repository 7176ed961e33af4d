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
from axolotl_reft.settings.components import (
    COMPONENTS,
    component_layer,
    from_pyreft_name,
)
from axolotl_reft.settings.foreign_names import intervention_hint
from axolotl_reft.settings.layers import LARGEST, parse_layers, resolve_layers

INTERVENTIONS = tuple(KINDS)


@dataclass(frozen=True)
class AdapterSpec:
    """Which tokens an adapter edits in which layers, and how.

    Attributes:
        layers, rank: as written; :meth:`ranks` resolves them for a model.
        tied: prefix and suffix have one intervention.
    """

    layers: Any
    rank: int | dict[str | int, int]
    positions: Positions
    turns: Turns
    tied: bool
    kind: InterventionKind
    component: str
    dropout: float
    act_fn: str | None

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> AdapterSpec:
        """Read the settings of ``adapter_config.json`` or of the YAML block;
        ValueError if one is out of its range."""
        layers, component = settings["layers"], settings["component"]
        dropout, act_fn = settings["dropout"], settings["act_fn"]
        parse_layers(layers)
        positions = Positions.parse(settings["positions"])
        turns = Turns.parse(settings["turns"], settings.get("turn_markers"))
        rank = _checked_rank(settings["rank"])
        tied = settings["tied_weights"]
        if type(tied) is not bool:
            raise ValueError(f"tied_weights: {shown(tied)} is neither true nor false")
        name = settings["intervention"]
        if not isinstance(name, str) or name not in KINDS:
            raise ValueError(
                f"intervention: {shown(name)} is unknown."
                f"{intervention_hint(name, INTERVENTIONS)} Choose one of: "
                f"{', '.join(INTERVENTIONS)}; classes of your own cannot be used"
            )
        kind = KINDS[name]
        _check_component(component, layers)
        check_probability("dropout", dropout)
        if dropout and not kind.takes_dropout:
            raise ValueError(
                f"dropout: {shown(dropout)} would have no effect, {kind.name} has no "
                "dropout in pyreft; set dropout: 0.0"
            )
        if act_fn is not None:
            _check_act_fn(act_fn, kind)
        _check_init_weights(settings.get("init_weights", "random"), kind, act_fn)
        tied = tied or not positions.two_sided
        return cls(
            layers, rank, positions, turns, tied, kind, component, dropout, act_fn
        )

    def ranks(self, count: int) -> dict[int, int]:
        """Return the rank of each edited layer in a model of ``count`` layers;
        ValueError if a layer is outside the model, or the ranks do not suit."""
        named = component_layer(self.component)
        if named is not None and named >= count:
            raise ValueError(
                f"component: {self.component!r} names layer {named}, and the base "
                f"model has {count} layers; use 0 to {count - 1}"
            )
        edited = [named] if named is not None else resolve_layers(self.layers, count)
        if not isinstance(self.rank, dict):
            return dict.fromkeys(edited, self.rank)
        ranks: dict[int, int] = {}
        for layers, rank in self.rank.items():
            for layer in resolve_layers(layers, count) if layers != "all" else ():
                if layer in ranks:
                    raise ValueError(f"rank: layer {layer} has two ranks; give it one")
                if layer not in edited:
                    raise ValueError(
                        f"rank: layer {layer} has a rank, but is not among layers: "
                        f"{self.layers!r}; name it there, or leave out its rank"
                    )
                ranks[layer] = rank
        others = [layer for layer in edited if layer not in ranks]
        if others and "all" not in self.rank:
            raise ValueError(
                f"rank: layer {others[0]} has none; name it in the mapping, or give "
                "the rank of the others as all"
            )
        return ranks | dict.fromkeys(others, self.rank.get("all", 0))

    @property
    def sides(self) -> int:
        """The number of interventions of a layer: two for untied prefix and suffix."""
        return 1 if self.tied else 2


def _checked_rank(rank: object) -> int | dict[str | int, int]:
    """Return the rank, or ranks by layer with keys as text, as JSON will have them."""
    if rank == {}:
        raise ValueError("rank: the mapping of layers to ranks is empty; write rank: 8")
    ranks: dict[str | int, int] = {}
    for layers, value in rank.items() if isinstance(rank, dict) else [("all", rank)]:
        parse_layers(layers, "rank")
        if str(layers) in ranks:
            raise ValueError(
                f"rank: {layers} is named twice, as a number and as text; name it once"
            )
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise ValueError(
                f"rank: {shown(value)} is not a whole number of at least 1; 4 to 8 are "
                "usual. Ranks by layer are a mapping, for example {0-15: 4, all: 8}"
            )
        ranks[str(layers)] = value
    return ranks if isinstance(rank, dict) else ranks["all"]


def _check_component(component: object, layers: object) -> None:
    if isinstance(component, (list, tuple)):
        raise ValueError(
            f"component: {shown(component)} is a list, and an adapter edits one; train "
            "several, and use them together: model.base_model.set_adapter([...])"
        )
    if isinstance(component, str) and component.startswith("head_"):
        raise ValueError(
            f"component: {shown(component)}: pyreft's components of single heads are "
            "not supported; attention_value_output holds all heads"
        )
    read = from_pyreft_name(component)
    if read is None:
        raise ValueError(
            f"component: {shown(component)} is unknown."
            f"{did_you_mean(component, COMPONENTS)} Choose one of: "
            f"{', '.join(COMPONENTS)}; or name a module of the layer and its side by "
            "path, such as mlp.down_proj.output"
        )
    if read[0] is not None and layers != "all":
        raise ValueError(
            f"component: {shown(component)} names its layer, and layers: "
            f"{shown(layers)} does too; leave out layers, or write a path within them"
        )


def check_probability(setting: str, value: Any) -> None:
    """Raise ValueError unless a dropout is a number from 0 to below 1."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1:
        raise ValueError(f"{setting}: {shown(value)} is not a number from 0 to below 1")


def _check_act_fn(act_fn: object, kind: InterventionKind) -> None:
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
            "would not train; choose for example gelu, relu, silu or tanh"
        )


def _check_init_weights(
    init_weights: object, kind: InterventionKind, act_fn: str | None
) -> None:
    if init_weights not in ("random", "identity"):
        raise ValueError(
            f"init_weights: {shown(init_weights)} is neither random nor identity"
        )
    if init_weights == "random":
        return
    if kind.subtracts and not kind.has_weight:
        raise ValueError(
            f"init_weights: identity: {kind.name} has no Wh that could cancel Rh; use "
            "random"
        )
    if act_fn not in (None, "linear"):
        raise ValueError(
            f"init_weights: identity: with act_fn: {act_fn} it would be none, or would "
            "not be trained; use random, or act_fn: null"
        )
