"""The ``loreft:`` block of axolotl's YAML, and its place among axolotl's settings."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from axolotl_reft.config import LoreftConfig, did_you_mean
from axolotl_reft.plugin.checks import check_settings

_FIELDS = {field.name: field for field in fields(LoreftConfig)}


def _setting(name: str) -> Any:
    """A key of the block, described as in the adapter's own config."""
    field = _FIELDS[name]
    return Field(default=field.default, description=field.metadata["help"])


class LoreftBlock(BaseModel):
    """Settings of the LoReFT adapter."""

    model_config = ConfigDict(extra="forbid")

    layers: str | int | list[int | str] = _setting("layers")
    positions: str = _setting("positions")
    rank: int = _setting("rank")
    tied_weights: bool = _setting("tied_weights")
    intervention: str = _setting("intervention")
    component: str = _setting("component")
    dropout: float = _setting("dropout")
    act_fn: str | None = _setting("act_fn")

    @model_validator(mode="before")
    @classmethod
    def check_block(cls, data: Any) -> Any:
        """Our own messages, ahead of pydantic's."""
        if isinstance(data, cls):
            return data
        known = tuple(cls.model_fields)
        if not isinstance(data, dict):
            raise ValueError(
                f"loreft: {data!r} is not a block of settings; write for example\n"
                "loreft:\n  positions: f7+l7\n  rank: 8"
            )
        for key in data:
            if key not in known:
                raise ValueError(
                    f"loreft: unknown key {key!r}.{did_you_mean(key, known)} Known "
                    f"keys: {', '.join(known)}"
                )
        LoreftConfig(**{k: v for k, v in data.items() if v is not None})
        # A key without a value means its default, as elsewhere in axolotl's YAML.
        return {k: v for k, v in data.items() if v is not None}


class LoreftArgs(BaseModel):
    """What the plugin adds to axolotl's config."""

    loreft: LoreftBlock | None = Field(
        default=None,
        description="Settings of `adapter: loreft`; see LoreftBlock. Register the "
        "`axolotl_reft.LoreftPlugin` plugin to enable this block.",
    )

    @model_validator(mode="before")
    @classmethod
    def check_misplaced_keys(cls, data: Any) -> Any:
        """axolotl drops unknown keys at the top without a word; these are ours."""
        if not isinstance(data, dict):
            return data
        adapter = data.get("adapter")
        for key in data:
            ours = adapter == "loreft" and key in LoreftBlock.model_fields
            near = re.match(r"(?i)(lo[-_.]?)?reft", str(key)) and key != "loreft"
            if ours or near:
                raise ValueError(
                    f"{key}: is not a key at the top of the config; the adapter's "
                    "settings go into a block, for example\nloreft:\n"
                    "  positions: f7+l7\n  rank: 8"
                )
        return data

    @model_validator(mode="after")
    def check_beside_other_settings(self) -> LoreftArgs:
        adapter = getattr(self, "adapter", None)
        if adapter != "loreft":
            if self.loreft is not None:
                raise ValueError(
                    f"loreft: the block is set, but adapter is {adapter!r}; set "
                    "adapter: loreft, or remove the block"
                )
            return self
        if self.loreft is None:
            self.loreft = LoreftBlock()
        check_settings(self, self.loreft.positions)
        return self
