"""The ``loreft:`` block of axolotl's YAML, and its place among axolotl's settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from axolotl_reft.errors import did_you_mean, shown
from axolotl_reft.plugin.quantised import with_quantization
from axolotl_reft.plugin.refusals import refuse
from axolotl_reft.settings.foreign_names import KEYS as FOREIGN_KEYS
from axolotl_reft.settings.foreign_names import hint
from axolotl_reft.settings.frozen_prompt import check_frozen_prompt, parse_kept_size
from axolotl_reft.tuner.config import LoreftConfig

_EXAMPLE = "loreft:\n  positions: f7+l7\n  rank: 8"
_SWEEP = "In a file for axolotl's --sweep write loreft.rank: [4, 8]"
# Fields of the adapter's config that no user writes.
_SET_BY_THE_PACKAGE = (
    "turn_markers", "vocab_size", "format_version", "axolotl_reft_version",
)  # fmt: skip
_TYPES = get_type_hints(LoreftConfig)
_FIELDS: dict[str, Any] = {
    field.name: (
        _TYPES[field.name],
        Field(default=field.default, description=field.metadata["help"]),
    )
    for field in fields(LoreftConfig)
    if field.name in LoreftConfig.__annotations__
    and field.name not in _SET_BY_THE_PACKAGE
}
_Settings: Any = create_model(
    "_Settings", __config__=ConfigDict(extra="forbid"), **_FIELDS
)


class LoreftBlock(_Settings):
    """Settings of the LoReFT adapter, and of its training."""

    frozen_prompt: str | bool = Field(
        "auto",
        description="Compute the tokens before the first edited one apart, without "
        "gradients: auto where it saves time, true wherever positions: l<m> allows it, "
        "or false. Losses and gradients are the same.",
    )
    frozen_prompt_cache: str | int | dict[str, str | int] | None = Field(
        None,
        description="Memory in which their keys and values are kept for later steps, "
        "such as 8GB, or {device: 8GB} for the accelerator's. Default: a quarter of "
        "the host's free memory; 0 keeps nothing.",
    )

    @model_validator(mode="before")
    @classmethod
    def check(cls, data: Any) -> Any:
        return data if isinstance(data, cls) else _checked_block(data)


class LoreftArgs(BaseModel):
    """Keys that the plugin adds to axolotl's config."""

    loreft: LoreftBlock | None = Field(
        None, description="Settings of `adapter: loreft`; see LoreftBlock."
    )
    loreft_log_edits: bool | None = Field(
        None,
        description="Log the sizes of edits and gradients, and before the first step "
        "show which tokens are edited and what the first edit costs. Default: true.",
    )
    loreft_labelled_logits: bool | None = Field(
        None,
        description="Compute only the logits of tokens with labels, where the loss is "
        "the same. Default: true.",
    )

    @model_validator(mode="before")
    @classmethod
    def check_keys(cls, data: Any) -> Any:
        _check_keys_at_the_top(data)
        return data

    @model_validator(mode="after")
    def check_beside_other_settings(self) -> LoreftArgs:
        self.loreft = _check_together(self.__dict__, self.loreft)
        if self.loreft is not None:
            self.lora_modules_to_save = self.loreft.modules_to_save
            self.overrides_of_model_kwargs = with_quantization(self.__dict__)
        return self


def move_into_block(settings: MutableMapping[str, Any]) -> None:
    """Move keys such as ``loreft.rank`` into the block, over what it says.

    axolotl's ``--sweep`` sets keys at the top alone.
    """
    for key in [key for key in settings if str(key).startswith("loreft.")]:
        set_nested(settings, key, settings.pop(key))


def set_nested(settings: MutableMapping[str, Any], key: str, value: Any) -> None:
    """Set ``a.b.c``; a ValueError where ``a`` or ``a.b`` is no block of settings."""
    *outer, last = key.split(".")
    for name in outer:
        if settings.get(name) is None:
            settings[name] = {}
        settings = settings[name]
        if not isinstance(settings, MutableMapping):
            raise ValueError(
                f"{key}: {name} is {shown(settings)}, not a block of settings; write "
                f"for example\n{_EXAMPLE}"
            )
    settings[last] = value


def adapter_settings(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the block that are the adapter's, as LoreftConfig's."""
    return {key: block[key] for key in block if key in _FIELDS}


def check_as_written(settings: Mapping[str, Any]) -> None:
    """Run every check that needs the YAML alone, ahead of axolotl's own.

    Validation repeats them, but there their messages are lines in pydantic's report.
    """
    _check_keys_at_the_top(settings)
    block = settings.get("loreft")
    block = None if block is None else LoreftBlock(**_checked_block(block))
    _check_together(settings, block)


def _checked_block(data: Any) -> dict[str, Any]:
    """Check the block with the config's messages, ahead of pydantic's."""
    if not isinstance(data, dict):
        raise ValueError(
            f"loreft: {shown(data)} is not a block of settings; write for example\n"
            f"{_EXAMPLE}\n{_SWEEP}"
        )
    known = tuple(LoreftBlock.model_fields)
    if unknown := [key for key in data if key not in known]:
        named = ", ".join(map(shown, unknown))
        hints = "".join(hint(key, known) for key in unknown)
        raise ValueError(
            f"loreft: unknown key{'s' * (len(unknown) > 1)} {named}.{hints} Known "
            f"keys: {', '.join(known)}"
        )
    # A key without a value means its default, as elsewhere in axolotl's YAML.
    settings = {key: value for key, value in data.items() if value is not None}
    config = LoreftConfig(**adapter_settings(settings))
    check_frozen_prompt(settings.get("frozen_prompt", "auto"), config.spec().positions)
    parse_kept_size(settings.get("frozen_prompt_cache"))
    # A mapping's keys as text: axolotl sorts them when it shows the settings.
    return settings | ({"rank": config.rank} if "rank" in settings else {})


def _check_keys_at_the_top(settings: Mapping[str, Any]) -> None:
    """Refuse keys that belong into the block; axolotl drops unknown keys silently."""
    ours = tuple(LoreftArgs.model_fields)
    for key in map(str, settings):
        misplaced = settings.get("adapter") == "loreft" and (
            key in LoreftBlock.model_fields or key in FOREIGN_KEYS
        )
        misspelled = re.match(r"(?i)(lo[-_.]?)?reft", key) and key not in ours
        if misplaced or misspelled:
            # The known names all begin alike.
            advice = hint(key, ()) or did_you_mean(key, ours, cutoff=0.8)
            raise ValueError(
                f"{key}: is not a key at the top of the config.{advice} The adapter's "
                f"settings go into a block, for example\n{_EXAMPLE}"
            )


def _check_together(
    settings: Mapping[str, Any], block: LoreftBlock | None
) -> LoreftBlock | None:
    """Check the block, by default its defaults, together with axolotl's settings."""
    adapter = settings.get("adapter")
    if adapter == "loreft":
        block = block or LoreftBlock()
        refuse(settings, block)
        with_quantization(settings)
    elif block is not None:
        raise ValueError(
            f"loreft: the block is set, but adapter is {adapter!r}; set adapter: "
            "loreft, or remove the block"
        )
    return block
