"""The adapter's configuration: what ``adapter_config.json`` and the YAML block hold."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from peft import PeftConfig, PeftType

from axolotl_reft.errors import shown
from axolotl_reft.settings.config_file import (
    FORMAT_VERSION,
    check_format,
    package_version,
    read_config_file,
)
from axolotl_reft.settings.foreign_names import hint
from axolotl_reft.settings.layers import LARGEST
from axolotl_reft.settings.lora import checked_lora
from axolotl_reft.settings.spec import INTERVENTIONS, AdapterSpec

T = TypeVar("T")


def _setting(default: T, description: str) -> T:
    return field(default=default, metadata={"help": description})


def _extend_peft_type(name: str) -> PeftType:
    """Add a member to ``PeftType`` as its class body would have; once.

    Saving looks a method up there, where a plain string would fail.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType)
    member.__objclass__ = PeftType
    # Patch: PEFT looks methods up in its own enumeration.
    # The attribute first: the metaclass refuses to set one that the map already holds.
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


LOREFT = _extend_peft_type("LOREFT")


@dataclass
class LoreftConfig(PeftConfig):
    """Configuration of a LoReFT adapter (arXiv 2404.03592).

    Raises:
        ValueError: a value is out of its range. Layers and rank are checked against the
            base model when the adapter is built.
    """

    layers: str | int | list[int | str] = _setting(
        "all",
        "Decoder layers to edit: 'all', a list such as [3, 9, 18, 24], or a range such "
        "as '8-15', both ends included. Negative numbers count from the top.",
    )
    positions: str = _setting(
        "f7+l7",
        "Prompt tokens to edit: 'f<n>' the first n, 'l<n>' the last n, 'f<n>+l<m>' "
        "both, each at most half of the prompt; 'all' every token, decode steps too.",
    )
    rank: int | dict[str | int, int] = _setting(
        8,
        "Rank of the edit, from 1 to the hidden size; or a mapping of layers to ranks "
        "such as {'0-15': 4, 'all': 8}, in which 'all' stands for the others.",
    )
    turns: str = _setting(
        "every",
        "In a conversation, 'every' edits the prompt of each turn, 'first' that of the "
        "first alone.",
    )
    tied_weights: bool = _setting(
        True,
        "One intervention for prefix and suffix; false: one each, with twice the "
        "parameters.",
    )
    intervention: str = _setting(
        "loreft", "The edit to learn, one of: " + ", ".join(INTERVENTIONS)
    )
    component: str = _setting(
        "block_output",
        "What is edited: 'block_output', the residual stream after the layer; another "
        "of pyreft's components, such as 'mlp_output' or 'attention_input'; or the "
        "side of a module by its path, such as 'mlp.down_proj.output'.",
    )
    dropout: float = _setting(
        0.0, "Dropout on the whole edited hidden state, as in pyreft; below 1."
    )
    act_fn: str | None = _setting(
        None,
        "Activation f in h + Rᵀ(f(Wh + b) − Rh), a key of transformers' ACT2FN; null "
        "is linear.",
    )
    init_weights: str = _setting(
        "random",
        "The edit that training begins with: 'random', as pyreft draws it, or "
        "'identity', none: W = R, or 0 in kinds without − Rh, and b = 0.",
    )
    turn_markers: dict[str, list] | None = _setting(
        None,
        "Marks of the chat template that tell the turns of a conversation: what "
        "axolotl_reft.turn_markers(tokenizer) returns. axolotl's plugin sets them.",
    )
    lora: dict[str, Any] | None = _setting(
        None,
        "LoRA beside LoReFT, on every token, in all layers: a mapping of r (default "
        "8), alpha (r), dropout (0) and target_modules (names of a layer's linear "
        "modules; all-linear); null for none.",
    )
    modules_to_save: list[str] | None = _setting(
        None,
        "Modules outside of the layers to train whole and to save with the adapter, "
        "such as ['embed_tokens', 'lm_head'] with new tokens, or a classifier's head.",
    )
    vocab_size: int | None = _setting(
        None,
        "Rows of the embeddings saved with the adapter, noted when it is made; a base "
        "with fewer gets as many.",
    )

    format_version: int = _setting(FORMAT_VERSION, "Written when it is saved.")
    axolotl_reft_version: str | None = _setting(None, "Written when it is saved.")

    def __new__(cls, *args: Any, **kwargs: Any) -> LoreftConfig:
        # Ahead of the fields: PEFT drops those it does not know, with a warning.
        version = kwargs.get("format_version", FORMAT_VERSION)
        check_format(version, kwargs.get("axolotl_reft_version"))
        known = cls._names()
        for key in kwargs.keys() - set(known):
            raise TypeError(f"LoreftConfig has no setting {key!r}.{hint(key, known)}")
        return super().__new__(cls)

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        return tuple(setting.name for setting in fields(cls) if setting.init)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as saved, with today's format and version."""
        now = {"axolotl_reft_version": package_version()}
        return super().to_dict() | now | {"format_version": FORMAT_VERSION}

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        return read_config_file(path_json_file, cls._names())

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LOREFT
        # Set from `layers` when the adapter meets a model; not part of the file.
        self.target_modules: set[str] | None = None
        self.rank = self.spec().rank
        if (names := self.modules_to_save) is not None:
            # Of a text PEFT would take the letters for names.
            is_list = isinstance(names, (list, tuple, set))
            if not is_list or not all(n and isinstance(n, str) for n in names):
                raise ValueError(
                    f"modules_to_save: {shown(names)} is not a list of names of "
                    "modules; write for example [embed_tokens, lm_head]"
                )
        rows = self.vocab_size
        if rows is not None and (type(rows) is not int or not 1 <= rows <= LARGEST):
            raise ValueError(
                f"vocab_size: {shown(rows)} is not a number of tokens; leave it out, "
                "it is noted when the adapter is made"
            )
        if self.lora is not None:
            # Nested, so that no `r` stands at the top: axolotl's merge would take the
            # adapter for LoRA's.
            self.lora = checked_lora(self.lora)

    def spec(self) -> AdapterSpec:
        """Parse the settings; ValueError if one is out of its range."""
        return AdapterSpec.parse(self.__dict__)
