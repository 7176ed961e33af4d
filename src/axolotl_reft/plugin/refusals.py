"""Settings that contradict ``adapter: loreft``: tables of rows, and one loop over them.

A table is a condition and its rows, ``condition: "reason; remedy"``. A condition is
``key``, which must be set, or ``key = pattern``, a regular expression that the whole
value, or an entry of a list, must match, or a function that returns the offending
"KEY: VALUE", or a tuple of such. Keys are paths; ``$NAME`` is an environment variable.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from axolotl_reft.training.vllm_server import training_command

Settings = Mapping[str, Any]
Condition = str | Callable[[Settings], str | None] | tuple["Condition", ...]
Table = tuple[Condition, Mapping[Any, str]]

_OR_ALL = "or edit every token with positions: all"
_DATA = ("datasets", "test_datasets")
_ENDS = ("train_on_eos", "train_on_eot")
_WIDTHS = ("load_in_4bit", "load_in_8bit")
_SEVERAL = r"[2-9]|[1-9]\d+"


def refuse(settings: Settings, block: BaseModel) -> None:
    """Raise the first refusal of axolotl's settings beside the adapter's block.

    As a ValueError, "KEY: VALUE with adapter: loreft: REASON; REMEDY".
    """
    environment = {f"${key}": value.lower() for key, value in os.environ.items()}
    merged = {**settings, **dict(block), "adapter": "loreft", **environment}
    # DeepSpeed's settings may be the path of a file; axolotl reports a wrong one.
    with suppress(KeyError, OSError, TypeError, ValueError):
        text = Path(merged["deepspeed"]).read_text(encoding="utf-8")
        merged["deepspeed"] = json.loads(text)
    for beside, rows in _TABLES:
        context = find(beside, merged)
        for condition, text in rows.items() if context else ():
            if subject := find(condition, merged):
                raise ValueError(f"{subject} with {context}: {text}")


def find(condition: Condition, settings: Settings) -> str | None:
    """Return the "KEY: VALUE" that a condition is about, or None."""
    if isinstance(condition, tuple):
        return next(filter(None, (find(c, settings) for c in condition)), None)
    if not isinstance(condition, str):
        return condition(settings)
    key, _, pattern = condition.partition(" = ")
    for value in map(plain, values(settings, key)):
        if not pattern or re.fullmatch(pattern, str(value)):
            return f"{key.removeprefix('$')}: {value}"
    return None


def values(settings: Settings, path: str) -> list[Any]:
    """Return what is set at a path, and of lists on the way every entry."""
    found: list[Any] = [settings]
    for key in path.split("."):
        found = [dict(e).get(key) for e in found if isinstance(e, Mapping | BaseModel)]
        found = [e for v in found for e in (v if isinstance(v, list) else [v])]
    return [value for value in found if value]


def plain(value: Any) -> Any:
    """Return a value as YAML would show it."""
    if isinstance(value, Enum):
        return value.value
    return str(value).lower() if isinstance(value, bool) else value


def _without(*keys: str) -> Condition:
    return lambda settings: None if find(keys, settings) else f"no {' or '.join(keys)}"


def _scoring_after_training(settings: Settings) -> str | None:
    """axolotl's LMEvalPlugin, which would fail when the training is over."""
    tasks = settings.get("lm_eval_tasks")
    scores = tasks and settings.get("lm_eval_post_train") is not False
    return find(r"plugins = .*\bLMEvalPlugin", settings) if scores else None


def _misplaced_modules(settings: Settings) -> str | None:
    """Unless validation has put the block's own there, where axolotl looks for them."""
    value = settings.get("lora_modules_to_save")
    misplaced = value and value != settings["modules_to_save"]
    return f"lora_modules_to_save: {value}" if misplaced else None


def _lora_settings(settings: Settings) -> str | None:
    # The others are read for any adapter.
    pattern = (
        r"lora_(?!(model_dir|on_cpu|modules_to_save)$)"
        r"|peft_(?!autocast_adapter_dtype$)|peft$"
    )
    found = (k for k, value in settings.items() if value and re.match(pattern, str(k)))
    return ", ".join(f"{key}: {plain(settings[key])}" for key in found)


def _misplaced_bnb_setting(settings: Settings) -> str | None:
    keys = (k for k in settings if str(k).startswith(("bnb_4bit_", "llm_int8_")))
    return next((f"{key}: {settings[key]}" for key in keys), None)


def _fsdp1(settings: Settings) -> str | None:
    if not (settings.get("fsdp") or settings.get("fsdp_config")):
        return find("$ACCELERATE_USE_FSDP = true", settings)
    paths = ("fsdp_version", "fsdp_config.fsdp_version", "fsdp_config.version")
    version = next((v for path in paths for v in values(settings, path)), 1)
    return f"fsdp_version: {version}" if str(version) != "2" else None


_TABLES: tuple[Table, ...] = (
    ("adapter", {
        ("merge_lora", "relora"): "LoReFT edits hidden states, which cannot be merged "
        "into weights; remove it",
        "loraplus_lr_ratio": "LoRA+ sets the learning rate of LoRA's B; remove it",
        ("unfrozen_parameters", "lisa_n_layers", r"plugins = .*\bSpectrumPlugin"):
        "it would train weights of the base, which are not saved with the adapter; "
        "remove it, and set loreft: layers, or modules_to_save to train modules whole",
        ("fp8", "qat", "optim_target_modules"): "LoReFT trains no weights of the base; "
        "remove it (load_in_8bit or load_in_4bit: true makes the base smaller)",
        "optimizer = (q_galore|galore|apollo|lomo|adalomo).*": "it is for large "
        "matrices of a base, which LoReFT does not train; set adamw_torch_fused",
        "process_reward_model": "not supported; remove it, or train a reward_model",
        _scoring_after_training: "lm_eval's own model cannot load the adapter; set "
        "lm_eval_post_train: false, and then run axolotl reft lm-eval config.yml",
        _misplaced_modules: "it is LoRA's; write\nloreft:\n  modules_to_save: [...]",
        _lora_settings: "settings of LoRA, which would do nothing; remove them. Rank, "
        "layers, dropout, and LoRA beside LoReFT (lora:), are set in the loreft: block",
        _misplaced_bnb_setting: "not a key at the top; use bnb_config_kwargs:",
        "rl = gdpo": "axolotl passes the adapter to TRL twice, which TRL refuses; "
        "write rl: grpo with trl.multi_objective_aggregation: normalize_then_sum, "
        "which is the same",
        "rl = ebft": "it generates under a special mask, or with vLLM by axolotl's "
        "own client, which merges the adapter; use rl: grpo",
    }),
    (_without("modules_to_save"), {
        ("embedding_lr", "embedding_lr_scale"): "no embeddings are trained; remove it, "
        "or write loreft: modules_to_save: [embed_tokens, lm_head]",
        "tokens": "their embeddings would not be trained and saved; write\nloreft:\n"
        "  modules_to_save: [embed_tokens, lm_head]\nor this base's names for them",
    }),
    ("rl", {
        "rl_adapter_ref_model": "the reference is the base without the adapter, and "
        "with a second model axolotl would not save the adapter; remove it",
        "trainer_cls": "only axolotl's own trainers tell the answers; remove it",
        ("trl.async_prefetch", "trl.use_data_producer"): "axolotl 0.19's trainer for "
        "it calls TRL 1.9 wrongly and stops at the first step; remove it",
        "trl.sync_ref_model": "TRL has no reference model beside an adapter; remove it",
    }),
    ("trl.use_vllm", {
        "trl.vllm_mode = colocate": "TRL builds this engine without adapters and "
        "merges them into the base; set trl.vllm_mode: server, and start in vLLM's "
        f"own environment {training_command('BASE', 8)}",
        "trl.vllm_lora_sync": "it is for axolotl's own server, which knows LoRA alone; "
        "remove it, each step's adapter is loaded by vllm serve",
    }),
    ("lora_model_dir", {
        "precompute_ref_log_probs": "TRL would compute the reference before the "
        "adapter is loaded; remove precompute_ref_log_probs",
    }),
    # With prompt positions, every sample must have a prompt that is not trained.
    ("positions = (?!all$).*", {
        "train_on_inputs": "the prompt is what comes before the first trained token, "
        f"and there would be none; set train_on_inputs: false, {_OR_ALL}",
        ("pretraining_dataset",
         *(f"{name}.type = (completion|pretrain)([.:].*)?" for name in _DATA)):
        f"raw text has no prompt to edit; use instruction data, {_OR_ALL}",
        r"plugins = .*\bDiffusionPlugin": "a diffusion language model has no prompt "
        f"before its answer; remove it, {_OR_ALL}",
        tuple(f"{name}.{key} = all" for name in _DATA for key in _ENDS):
        "the prompt would end with the user's turn, not where the answer begins; "
        f"write turn in place of all, {_OR_ALL}",
        tuple(f"{name}.roles_to_train = system|developer|user|human" for name in _DATA):
        "its tokens are the prompt, which ends before the first trained token; "
        f"leave it out, {_OR_ALL}",
    }),
    # Replicas (DDP), FSDP2 and ZeRO keep sequences and hidden states whole. Refused is
    # what cuts up a sequence, a layer or the stack of layers.
    ("adapter", {
        tuple(f"{key} = {_SEVERAL}" for key in (
            "context_parallel_size", "sequence_parallel_degree",
            "deepspeed.sequence_parallel_size",
            "$PARALLELISM_CONFIG_CP_SIZE", "$PARALLELISM_CONFIG_SP_SIZE",
        )): "a process would see a part of a sequence, without the start of its "
        "prompt; remove it, or set it to 1",
        tuple(f"{key} = {_SEVERAL}" for key in (
            "tensor_parallel_size", "expert_parallel_size",
            "deepspeed.tensor_parallel.autotp_size",
            "$PARALLELISM_CONFIG_TP_SIZE", "$PARALLELISM_CONFIG_EP_SIZE",
        )): "it is for LoRA alone; remove it, or set it to 1",
        ("$ACCELERATE_USE_MEGATRON_LM = true",
         f"deepspeed.pipeline.stages = {_SEVERAL}"):
        "the layers of a process would not see the batch that prompts are read from; "
        "remove it",
        _fsdp1: "FSDP1 flattens trained and frozen parameters together and rounds the "
        "adapter; write fsdp_version: 2 and fsdp_config: in the YAML, also where the "
        "launcher asks for FSDP",
    }),
    ("component = (?!block_output$|block_input$).*", {
        ("fsdp_config.activation_checkpointing",
         "fsdp_config.fsdp_activation_checkpointing"):
        "FSDP's checkpoints replay the inside of a layer without its batch; set "
        "gradient_checkpointing: true instead, or component: block_output",
    }),
    (r"component = mlp_activation|.*\bmlp\.\w+\..*", {
        "tiled_mlp": "it would see pieces of a sequence and not where the prompt is; "
        "remove it, or edit mlp_input or mlp_output",
    }),
    (r"component = mlp_activation|.*\.act_fn\..*", {
        ("liger_glu_activation", "liger_swiglu"): "Liger's kernel computes the "
        "activation and its product in one; remove it, or edit mlp.down_proj.input, "
        "which is the product",
    }),
    ("load_in_4bit", {"load_in_8bit": "a base has one bit width; remove one"}),
    (_WIDTHS, {
        ("fsdp", "fsdp_config"): "axolotl shards quantised bases for adapter: qlora "
        "alone; remove one of the two (without FSDP, each process holds the base)",
    }),
    (_without(*_WIDTHS), {
        "bnb_config_kwargs": "it would do nothing; set one of them, or remove it",
    }),
)  # fmt: skip
