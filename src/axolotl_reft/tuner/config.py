"""The adapter's configuration: what ``adapter_config.json`` and the YAML block hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig
from transformers.activations import ACT2FN

from axolotl_reft.errors import did_you_mean, shown
from axolotl_reft.prompts.positions import Positions
from axolotl_reft.prompts.turns import Turns
from axolotl_reft.settings.components import COMPONENTS, component_layer, is_component
from axolotl_reft.settings.config_file import read_config_file
from axolotl_reft.settings.foreign_names import hint, intervention_hint
from axolotl_reft.settings.format_version import (
    FORMAT_VERSION,
    check_format,
    package_version,
)
from axolotl_reft.tuner.peft_type import LOREFT

INTERVENTIONS = (
    "loreft",
    "noreft",
    "direft",
    "orthogonal_direft",
    "consreft",
    "lobireft",
)

# What pyreft's class takes but never reads, so that setting it would change nothing.
_WITHOUT_ACT_FN = ("consreft", "lobireft")
_WITHOUT_DROPOUT = ("consreft",)

# What `lora` holds, and what it is where nothing is said; an alpha of None is r.
ALL_LINEAR = "all-linear"
LORA = {"r": 8, "alpha": None, "dropout": 0.0, "target_modules": ALL_LINEAR}

# Nine digits are more than any model has; torch's integers end at nineteen.
_LARGEST = 999_999_999
_LAYER_ITEM = re.compile(r"(-?\d{1,9})(?:-(-?\d{1,9}))?", re.ASCII)
_ALPHAS = (1e-6, 1e6)


@dataclass
class LoreftConfig(PeftConfig):
    """Configuration of a LoReFT adapter (arXiv 2404.03592).

    Raises:
        ValueError: a value is out of its range; the message says what was got and what
            to write instead. Layers and rank are checked against the base model when
            the adapter is built.
    """

    layers: str | int | list[int | str] = field(
        default="all",
        metadata={
            "help": "Decoder layers to edit: 'all', a list such as [3, 9, 18, 24], a "
            "range such as '8-15' (both ends included); negative numbers count from "
            "the top, -1 being the last layer."
        },
    )
    positions: str = field(
        default="f7+l7",
        metadata={
            "help": "Prompt tokens to edit: 'f<n>' the first n, 'l<n>' the last n, "
            "'f<n>+l<m>' both, 'all' every token, decode steps included. On short "
            "prompts each side takes at most half of the prompt."
        },
    )
    rank: int | dict[str | int, int] = field(
        default=8,
        metadata={
            "help": "Rank of the edit, from 1 to the hidden size; or a mapping of "
            "layers to ranks such as {'0-15': 4, '16-31': 8}, in which 'all' stands "
            "for the others."
        },
    )
    turns: str = field(
        default="every",
        metadata={
            "help": "In a conversation, 'every' edits the prompt of each turn, 'first' "
            "that of the first turn alone. A prompt of a single turn is edited alike."
        },
    )
    tied_weights: bool = field(
        default=True,
        metadata={
            "help": "One intervention for prefix and suffix; false gives each its own, "
            "with twice the parameters."
        },
    )
    intervention: str = field(
        default="loreft",
        metadata={"help": "The edit to learn, one of: " + ", ".join(INTERVENTIONS)},
    )
    component: str = field(
        default="block_output",
        metadata={
            "help": "What is edited: 'block_output', the residual stream after the "
            "layer; another of pyreft's components, such as 'mlp_output' or "
            "'attention_input'; or the side of a module by its path, such as "
            "'mlp.down_proj.output'."
        },
    )
    dropout: float = field(
        default=0.0,
        metadata={
            "help": "Dropout on the whole edited hidden state, as in pyreft; from 0 to "
            "below 1."
        },
    )
    act_fn: str | None = field(
        default=None,
        metadata={
            "help": "Activation f in h + Rᵀ(f(Wh + b) − Rh), a key of transformers' "
            "ACT2FN; null is linear."
        },
    )
    turn_markers: dict[str, list] | None = field(
        default=None,
        metadata={
            "help": "The chat template's marks, by which the turns of a conversation "
            "are told in training and at inference: what "
            "axolotl_reft.turn_markers(tokenizer) returns. axolotl's plugin sets them."
        },
    )
    lora: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "LoRA beside LoReFT, on every token, in all layers: a mapping of "
            "r (default 8), alpha (default r), dropout (default 0) and target_modules "
            "(names of a layer's linear modules; default all-linear); null for none."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Other modules to train whole and to save with the adapter, such "
            "as ['embed_tokens', 'lm_head'] with new tokens, or a classifier's head; "
            "none within the decoder layers."
        },
    )
    vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of the embeddings saved with the adapter, noted when it is "
            "made; a base with fewer gets as many."
        },
    )

    format_version: int = field(
        default=FORMAT_VERSION,
        metadata={"help": "Of the saved adapter; written when it is saved."},
    )
    axolotl_reft_version: str | None = field(
        default=None,
        metadata={"help": "Of the package that saved it; written when it is saved."},
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> LoreftConfig:
        # Ahead of the fields: what PEFT does with those it does not know is to drop
        # them, with a warning.
        version = kwargs.get("format_version", FORMAT_VERSION)
        check_format(version, kwargs.get("axolotl_reft_version"))
        known = tuple(field.name for field in fields(cls) if field.init)
        for key in kwargs.keys() - set(known):
            raise TypeError(f"LoreftConfig has no setting {key!r}.{hint(key, known)}")
        return super().__new__(cls)

    def to_dict(self) -> dict[str, Any]:
        """As saved: in the format and by the version of now."""
        now = {"axolotl_reft_version": package_version()}
        return super().to_dict() | now | {"format_version": FORMAT_VERSION}

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        known = {field.name for field in fields(cls) if field.init}
        return read_config_file(path_json_file, known)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LOREFT
        # Set from `layers` when the adapter meets a model; not part of the file.
        self.target_modules: set[str] | None = None
        parse_layers(self.layers)
        Positions.parse(self.positions)
        Turns.parse(self.turns, self.turn_markers)
        if isinstance(self.rank, dict):
            # As JSON would have it, so that a reloaded configuration is the same.
            self.rank = _by_written_layers(self.rank)
        _check_rank(self.rank)
        if type(self.tied_weights) is not bool:
            raise ValueError(
                f"tied_weights: {shown(self.tied_weights)} is neither true nor false"
            )
        _check_intervention(self.intervention)
        _check_component(self.component, self.layers)
        _check_dropout(self.dropout, self.intervention)
        _check_act_fn(self.act_fn, self.intervention)
        _check_modules_to_save(self.modules_to_save)
        rows = self.vocab_size
        if rows is not None and (type(rows) is not int or not 1 <= rows <= _LARGEST):
            raise ValueError(
                f"vocab_size: {shown(rows)} is not a number of tokens; leave it out, "
                "it is noted when the adapter is made"
            )
        if self.lora is not None:
            # Nested, so that no `r` stands at the top: axolotl's merge would take the
            # adapter for LoRA's.
            self.lora = checked_lora(self.lora)


def _by_written_layers(ranks: dict[Any, Any]) -> dict[str | int, Any]:
    """The mapping with every key as text."""
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
    for one in ranks:
        if type(one) is not int or not 1 <= one <= _LARGEST:
            raise ValueError(
                f"rank: {shown(one)} is not a whole number of at least 1 and at most "
                "the hidden size; the paper uses 4 to 8. Ranks by layer are a mapping, "
                "for example {0-15: 4, all: 8}"
            )
    if not ranks:
        raise ValueError("rank: the mapping of layers to ranks is empty; write rank: 8")


def _check_intervention(intervention: object) -> None:
    if intervention not in INTERVENTIONS:
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


def _check_dropout(dropout: object, intervention: str) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise ValueError(f"dropout: {shown(dropout)} is not a number from 0 to below 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: {shown(dropout)} is not from 0 to below 1")
    if dropout and intervention in _WITHOUT_DROPOUT:
        raise ValueError(
            f"dropout: {shown(dropout)} would have no effect, {intervention} has no "
            "dropout in pyreft; set dropout: 0.0"
        )


def _check_act_fn(act_fn: object, intervention: str) -> None:
    if act_fn is None:
        return
    if not isinstance(act_fn, str) or act_fn not in ACT2FN:
        raise ValueError(
            f"act_fn: {shown(act_fn)} is unknown.{did_you_mean(act_fn, tuple(ACT2FN))} "
            f"Choose one of: {', '.join(ACT2FN)}; or null, which is linear"
        )
    if intervention in _WITHOUT_ACT_FN:
        raise ValueError(
            f"act_fn: {shown(act_fn)} would have no effect, {intervention} has no Wh "
            "to apply it to; set act_fn: null"
        )
    if list(ACT2FN[act_fn].parameters()):
        raise ValueError(
            f"act_fn: {shown(act_fn)} has parameters of its own, which an adapter "
            "would not train; choose one without, such as gelu, relu, silu or tanh"
        )


def _check_modules_to_save(modules: object) -> None:
    """A list: of a text PEFT would take the letters for names."""
    if modules is None:
        return
    names = modules if isinstance(modules, (list, tuple, set)) else [None]
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"modules_to_save: {shown(modules)} is not a list of names of modules; "
                "write for example [embed_tokens, lm_head]"
            )


def checked_lora(lora: object) -> dict[str, Any]:
    """The settings under ``lora``, each with its value.

    Raises:
        ValueError: it is no mapping, or has an unknown key or a wrong value.
    """
    if not isinstance(lora, Mapping):
        raise ValueError(
            f"lora: {shown(lora)} is not a mapping; write for example lora: {{r: 8}}, "
            "or leave it out for LoReFT alone"
        )
    for key in lora:
        if key not in LORA:
            raise ValueError(
                f"lora: unknown key {shown(key)}."
                f"{did_you_mean(_bare(key), tuple(LORA))} Known keys: {', '.join(LORA)}"
            )
    settings = LORA | {key: value for key, value in lora.items() if value is not None}
    r, alpha = settings["r"], settings["alpha"]
    if type(r) is not int or not 1 <= r <= _LARGEST:
        raise ValueError(
            f"lora: r: {shown(r)} is not a whole number of at least 1 and at most the "
            "hidden size; 8 is usual"
        )
    _check_alpha(r if alpha is None else alpha)
    alpha = r if alpha is None else alpha
    dropout = settings["dropout"]
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise ValueError(
            f"lora: dropout: {shown(dropout)} is not a number from 0 to below 1"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"lora: dropout: {shown(dropout)} is not from 0 to below 1")
    targets = _checked_targets(settings["target_modules"])
    return {"r": r, "alpha": alpha, "dropout": dropout, "target_modules": targets}


def _bare(key: object) -> object:
    """A key without the beginning that axolotl's own have."""
    return key.removeprefix("lora_") if isinstance(key, str) else key


def _check_alpha(alpha: object) -> None:
    low, high = _ALPHAS
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"lora: alpha: {shown(alpha)} is not a number; r is usual")
    # Beyond these, α/r times a float32 is zero or infinite before long.
    if not low <= alpha <= high:
        raise ValueError(
            f"lora: alpha: {shown(alpha)} is not a number from {low:g} to {high:g}; r "
            "is usual"
        )


def _checked_targets(targets: object) -> str | list[str]:
    if targets == ALL_LINEAR:
        return ALL_LINEAR
    if not isinstance(targets, (list, tuple)) or not targets:
        raise ValueError(
            f"lora: target_modules: {shown(targets)} is not a list of names; write for "
            f"example [q_proj, v_proj], or {ALL_LINEAR}"
        )
    for name in targets:
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"lora: target_modules: {shown(name)} is not the name of a module"
            )
    return list(dict.fromkeys(targets))


def edited_layers(config: LoreftConfig, count: int) -> list[int]:
    """The layers an adapter edits in a model of ``count``, sorted.

    Raises:
        ValueError: as :func:`resolve_layers`.
    """
    own = component_layer(config.component)
    if own is None:
        return resolve_layers(config.layers, count)
    if own >= count:
        raise ValueError(
            f"component: {config.component!r} names layer {own}, and the base model "
            f"has {count} layers; use 0 to {count - 1}"
        )
    return [own]


def layer_ranks(config: LoreftConfig, count: int) -> dict[int, int]:
    """The rank of each edited layer in a model of ``count`` layers.

    Raises:
        ValueError: as :func:`resolve_layers`, or the mapping of ranks and the edited
            layers do not agree.
    """
    edited = edited_layers(config, count)
    if not isinstance(config.rank, dict):
        return dict.fromkeys(edited, config.rank)
    ranks: dict[int, int] = {}
    for layers, rank in config.rank.items():
        if layers == "all":
            continue
        for number in resolve_layers(layers, count):
            if number in ranks:
                raise ValueError(f"rank: layer {number} has two ranks; give it one")
            if number not in edited:
                raise ValueError(
                    f"rank: layer {number} has a rank, but is not among layers: "
                    f"{config.layers!r}; name it there, or leave out its rank"
                )
            ranks[number] = rank
    without = [number for number in edited if number not in ranks]
    if without and "all" not in config.rank:
        raise ValueError(
            f"rank: layer {without[0]} has none; name it in the mapping, or give the "
            "rank of the others as all"
        )
    return ranks | dict.fromkeys(without, config.rank.get("all", 0))


def parse_layers(
    layers: object, setting: str = "layers"
) -> list[tuple[int, int]] | None:
    """Read the ``layers`` setting, or the layers of another one.

    Returns:
        Inclusive ranges, negative numbers still counting from the top; None for all.

    Raises:
        ValueError: the setting is not understood.
    """
    if layers == "all":
        return None
    items = layers if isinstance(layers, (list, tuple)) else [layers]
    ranges = []
    for item in items:
        for part in _parts(item):
            match = _LAYER_ITEM.fullmatch(part.strip(" "))
            if match is None:
                reason = "" if item is layers else f", {shown(item)} is not a layer"
                raise _bad_layers(setting, layers, reason)
            start = int(match[1])
            ranges.append((start, int(match[2]) if match[2] else start))
    if not ranges:
        raise _bad_layers(setting, layers, ", no layer is named")
    return ranges


def _parts(item: object) -> list[str]:
    """What a comma separates; nothing readable where it is neither number nor text."""
    if type(item) is int and abs(item) <= _LARGEST:
        return [str(item)]
    return item.split(",") if isinstance(item, str) else [""]


def _bad_layers(setting: str, layers: object, reason: str) -> ValueError:
    if setting != "layers":
        return ValueError(
            f"{setting}: {shown(layers)} is not understood as layers{reason}. Write "
            "for example {0-15: 4, all: 8}"
        )
    return ValueError(
        f"layers: {shown(layers)} is not understood{reason}. Write layers: all, a "
        "list such as [3, 9, 18, 24], a range such as 8-15, or negative numbers from "
        "the top such as [-1]"
    )


def resolve_layers(layers: object, count: int) -> list[int]:
    """The layer numbers that ``layers`` names in a model of ``count`` layers, sorted.

    Raises:
        ValueError: a layer is outside the model, named twice, or a range is empty.
    """
    ranges = parse_layers(layers)
    if ranges is None:
        return list(range(count))
    numbers: list[int] = []
    for ends in ranges:
        for end in ends:
            if not -count <= end < count:
                raise ValueError(
                    f"layers: {end} in {shown(layers)} is out of range, the base model "
                    f"has {count} layers; use 0 to {count - 1}, or -{count} to -1 from "
                    "the top"
                )
        start, stop = (end % count for end in ends)
        if start > stop:
            raise ValueError(
                f"layers: the range {ends[0]}-{ends[1]} in {shown(layers)} is empty in "
                f"a model of {count} layers; write the lower layer first"
            )
        numbers.extend(range(start, stop + 1))
    if len(set(numbers)) < len(numbers):
        twice = min(n for n, times in Counter(numbers).items() if times > 1)
        raise ValueError(
            f"layers: {shown(layers)} names layer {twice} twice; name it once. One "
            "intervention each for prefix and suffix is tied_weights: false"
        )
    return sorted(numbers)
