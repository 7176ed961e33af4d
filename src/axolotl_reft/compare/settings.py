"""Settings of runs in one form, so that LoReFT's and LoRA's stand side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
# What PEFT and this package note in an adapter's file beside settings.
_NOTED = {
    "auto_mapping", "axolotl_reft_version", "base_model_name_or_path",
    "format_version", "inference_mode", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "task_type", "turn_markers", "vocab_size",
}  # fmt: skip
# Keys of axolotl's config that change no result.
_NO_RESULT = re.compile(
    r"(output_dir|axolotl_config_path|dataset_prepared_path|plugins|adapter|loreft_log_"
    r"edits|debug.*|shard|(wandb|mlflow|comet|trackio|hub)_.*|use_wandb|use_mlflow|"
    r"use_comet)"
)
# Data and tokens that a loss is the mean over.
_OF_THE_LOSS = (
    "base_model", "chat_template", "datasets", "sequence_len", "test_datasets",
    "train_on_inputs", "val_set_size",
)  # fmt: skip


def adapter_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in an adapter's file; LoRA's r is its rank."""
    if not config:
        return {}
    found = {"method": config.get("peft_type")}
    for key, value in config.items():
        if key not in _NOTED and value not in (None, [], {}):
            found["rank" if key == "r" else key] = plain(value)
    return found


def training_settings(
    config: Mapping[str, Any] | None, adapter: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings of axolotl's config, nested ones with dots, without those
    that the adapter's file tells as they came to be."""
    found: dict[str, Any] = {}
    for key, value in _flat(config or {}):
        first, _, name = key.partition(".")
        ours = first == "loreft" or key.startswith("lora_") and key != "lora_model_dir"
        if _NO_RESULT.fullmatch(key) or value is None:
            continue
        if ours and not adapter:
            found[{"lora_r": "rank"}.get(key, name or key)] = plain(value)
        elif not ours or name in ("frozen_prompt", "frozen_prompt_cache"):
            found[key] = plain(value)
    if not adapter and (config or {}).get("adapter"):
        found["method"] = str((config or {})["adapter"]).upper()
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(value: Any) -> Any:
    """Write equal settings alike: 1e-3 is text in YAML; sets have no order."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        if value and all(isinstance(entry, Mapping) for entry in value):
            # Of a data set's settings axolotl fills in more and more.
            return ", ".join(str(e.get("path", dict(e))) for e in value)
        texts = [str(entry) for entry in value]
        return ", ".join(texts if _are_numbers(value) else sorted(texts))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(value[key])}" for key in sorted(value))
    return value


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def split_settings(
    runs: list[dict[str, Any]], written: list[bool], adapters: list[dict[str, Any]]
) -> tuple[list[str], dict[str, Any]]:
    """Return the names of settings that differ, and those that are the same.

    A setting of another method's adapter is not compared. Of a config with every
    default, only what others wrote is.
    """
    names = dict.fromkeys(key for adapter in adapters for key in adapter)
    records = [run for run, as_written in zip(runs, written, strict=True) if as_written]
    names |= dict.fromkeys(key for run in records or runs for key in run)
    differing, same = [], {}
    for name in names:
        methods = {a["method"] for a in adapters if name in a and name != "method"}
        if name.startswith("loreft."):
            methods = {"LOREFT"}
        values = [
            run.get(name) for run in runs if run.get("method") in methods or not methods
        ]
        if any(value != values[0] for value in values):
            differing.append(name)
        else:
            same[name] = values[0]
    return differing, same


def not_comparable(differing: list[str]) -> str:
    """Say why losses of runs cannot be compared, or nothing."""
    names = [name for name in _OF_THE_LOSS if name in differing]
    return (
        f"The runs differ in {', '.join(names)}: their losses are means over other "
        "tokens, and cannot be compared."
        if names
        else ""
    )
