"""Every place in vLLM that LoReFT changes, in one list.

The entry point of plugins is documented; these functions are not. So they are changed
on tested releases alone, and only if all of them take the arguments that are expected.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from axolotl_reft.serving import wrapped_engine, wrapped_worker

Function = Callable[..., Any]


class Patch(NamedTuple):
    """A function of vLLM that is wrapped.

    Attributes:
        owners: modules or classes that hold it, as ``module`` or ``module:Class``.
        parameters: that it takes, in order.
        wrap: makes the replacement from the original.
    """

    owners: tuple[str, ...]
    name: str
    parameters: str
    wrap: Callable[[Function], Function]


_EXPERTS = "vllm.model_executor.layers.fused_moe"
_BLOCK_KEYS = ("vllm.v1.core.kv_cache_utils", "vllm.v1.core.block_pool")
_RUNNER = ("vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin",)
_MANAGER = ("vllm.lora.model_manager:LoRAModelManager",)
PATCHES = (
    Patch(
        ("vllm.engine.arg_utils:EngineArgs",),
        "create_engine_config",
        "self usage_context headless",
        wrapped_engine.create_engine_config,
    ),
    Patch(
        ("vllm.config.vllm:VllmConfig",),
        "_get_v2_model_runner_unsupported_features",
        "self",
        wrapped_engine.unsupported_by_v2,
    ),
    Patch(
        ("vllm.config.lora:LoRAConfig",),
        "compute_hash",
        "self",
        wrapped_engine.compute_hash,
    ),
    Patch(
        (
            f"{_EXPERTS}.oracle.unquantized",
            f"{_EXPERTS}.unquantized_fused_moe_method",
        ),
        "select_unquantized_moe_backend",
        "moe_config",
        wrapped_engine.select_experts,
    ),
    Patch(
        ("vllm.v1.engine.input_processor:InputProcessor",),
        "process_inputs",
        "self request_id prompt params supported_tasks arrival_time lora_request "
        "tokenization_kwargs trace_headers priority data_parallel_rank resumable "
        "session_id kv_hints",
        wrapped_engine.process_inputs,
    ),
    Patch(
        ("vllm.v1.engine.async_llm:AsyncLLM", "vllm.v1.engine.llm_engine:LLMEngine"),
        "add_lora",
        "self lora_request",
        wrapped_engine.add_lora,
    ),
    Patch(
        ("vllm.entrypoints.openai.models.serving:OpenAIServingModels",),
        "_check_load_lora_adapter_request",
        "self request",
        wrapped_engine.check_load_request,
    ),
    Patch(
        ("vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin",),
        "beam_search",
        "self prompt request_id params lora_request trace_headers session_id",
        wrapped_engine.beam_search,
    ),
    Patch(
        ("vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin",),
        "beam_search",
        "self prompts params lora_request use_tqdm concurrency_limit",
        wrapped_engine.beam_search,
    ),
    Patch(
        _BLOCK_KEYS,
        "generate_block_hash_extra_keys",
        "request start_token_idx end_token_idx start_mm_idx",
        wrapped_engine.extra_keys,
    ),
    Patch(
        _RUNNER,
        "load_lora_model",
        "self model vllm_config device",
        wrapped_worker.load_lora_model,
    ),
    Patch(
        _RUNNER,
        "_set_active_loras",
        "self prompt_lora_mapping token_lora_mapping lora_requests mapping_type",
        wrapped_worker.clear_rows,
    ),
    Patch(
        _RUNNER,
        "set_active_loras",
        "self input_batch num_scheduled_tokens num_sampled_tokens mapping_type",
        wrapped_worker.find_rows,
    ),
    Patch(
        ("vllm.lora.worker_manager:WorkerLoRAManager",),
        "_load_adapter",
        "self lora_request",
        wrapped_worker.load_adapter,
    ),
    Patch(_MANAGER, "_add_adapter", "self lora", wrapped_worker.add_adapter),
    Patch(
        _MANAGER, "activate_adapter", "self lora_id", wrapped_worker.activate_adapter
    ),
)


@cache  # vLLM may call a plugin more than once
def apply_patches() -> None:
    """Change every function of the list; ``ValueError``, and none is changed, if one is
    missing or takes other arguments."""
    found = [(patch, [_owner(path) for path in patch.owners]) for patch in PATCHES]
    for patch, owners in found:
        for path, owner in zip(patch.owners, owners, strict=True):
            function = getattr(owner, patch.name, None)
            takes = function and " ".join(inspect.signature(function).parameters)
            if takes != patch.parameters:
                raise ValueError(
                    f"{path}.{patch.name} takes ({takes}), expected "
                    f"({patch.parameters})"
                )
    for patch, owners in found:
        for owner in owners:
            # Patch: all of the list.
            setattr(owner, patch.name, patch.wrap(getattr(owner, patch.name)))


def _owner(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name) if name else import_module(module)
