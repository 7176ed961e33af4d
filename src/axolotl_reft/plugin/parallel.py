"""Which ways of using several processes are right for the adapter.

Every process must see whole sequences and whole hidden states, so replicas (DDP), FSDP2
and ZeRO are, and whatever cuts up a sequence, a layer or the stack of layers is not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SEQUENCE = (
    "each process would see a piece of a sequence and not know where its prompt begins"
)
_TENSOR = "PEFT supports tensor parallelism for LoRA alone"
_EXPERTS = "axolotl's expert parallelism cuts up and saves adapters of LoRA alone"
_STACK = "the layers of a process would not see the batch that prompts are read from"

# Refused above 1, by the YAML's key, ...
_SIZES = {
    "context_parallel_size": _SEQUENCE,
    "sequence_parallel_degree": _SEQUENCE,
    "tensor_parallel_size": _TENSOR,
    "expert_parallel_size": _EXPERTS,
}
# ... by what launchers set for accelerate, whatever the YAML says, ...
_ENVIRONMENT = {
    "PARALLELISM_CONFIG_CP_SIZE": _SEQUENCE,
    "PARALLELISM_CONFIG_SP_SIZE": _SEQUENCE,
    "PARALLELISM_CONFIG_TP_SIZE": _TENSOR,
    "PARALLELISM_CONFIG_EP_SIZE": _EXPERTS,
}
# ... and in DeepSpeed's config, by path.
_DEEPSPEED = {
    "tensor_parallel.autotp_size": _TENSOR,
    "sequence_parallel_size": _SEQUENCE,
    "pipeline.stages": _STACK,
}


def check_parallel(settings: Mapping[str, Any], component: str) -> None:
    """Refuse ways of using several processes that cannot be right.

    Args:
        settings: axolotl's config, as written or as validated.
        component: what the adapter edits.

    Raises:
        ValueError: the setting, what it is, why not, and the remedy.
    """
    for key, reason in _SIZES.items():
        _refuse_size(key, settings.get(key), reason, f"set {key}: 1")
    for name, reason in _ENVIRONMENT.items():
        value = os.environ.get(name)
        _refuse_size(name, value, f"{reason} (the launcher sets it)", f"unset {name}")
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "false").lower() == "true":
        raise ValueError(
            f"ACCELERATE_USE_MEGATRON_LM with adapter: loreft: {_STACK}; launch without"
        )
    config = _deepspeed_config(settings.get("deepspeed"))
    for path, reason in _DEEPSPEED.items():
        value = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        _refuse_size(f"deepspeed: {path}", value, reason, "remove it")
    _check_fsdp(settings, component)


def _refuse_size(name: str, value: Any, reason: str, remedy: str) -> None:
    if str(value).isdecimal() and int(value) > 1:
        raise ValueError(f"{name}: {value} with adapter: loreft: {reason}; {remedy}")


def _deepspeed_config(deepspeed: Any) -> Any:
    """DeepSpeed's settings, given whole or by the path of a file."""
    if not isinstance(deepspeed, str):
        return deepspeed
    try:
        return json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # axolotl says what is wrong with the path


def _check_fsdp(settings: Mapping[str, Any], component: str) -> None:
    config = settings.get("fsdp_config") or {}
    if not config and not settings.get("fsdp"):
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ValueError(
                "ACCELERATE_USE_FSDP with adapter: loreft: the launcher asks for FSDP "
                "and the config does not, so the adapter would be rounded to its mixed "
                "precision; write fsdp_version: 2 and fsdp_config: in the YAML"
            )
        return
    if not isinstance(config, Mapping):
        config = config.model_dump()
    version = settings.get("fsdp_version") or next(
        (value for key in ("fsdp_version", "version") if (value := config.get(key))), 1
    )
    if str(version) != "2":
        raise ValueError(
            f"fsdp_version: {version} with adapter: loreft: FSDP1 flattens trained and "
            "frozen numbers together and rounds the adapter to its mixed precision; "
            "set fsdp_version: 2"
        )
    replayed = any(
        config.get(key)
        for key in ("activation_checkpointing", "fsdp_activation_checkpointing")
    )
    if replayed and component not in ("block_output", "block_input"):
        raise ValueError(
            f"fsdp_config: activation_checkpointing: true with component: {component}: "
            "FSDP's checkpoints replay what is inside a layer without its batch; set "
            "gradient_checkpointing: true in its place, or component: block_output"
        )
