"""Every place in vLLM that LoReFT changes, with the reason, in one list.

The entry point of plugins is documented; these functions are not. So they are changed
on tested releases alone, and only if all of them take the arguments that are expected.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from http import HTTPStatus
from importlib import import_module
from typing import Any, NamedTuple

from vllm.config import get_current_vllm_config
from vllm.entrypoints.serve import create_error_response
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest

from axolotl_reft.serving.adapters import is_loreft_number, load_spec
from axolotl_reft.serving.edited_tokens import EditedTokens
from axolotl_reft.serving.engine import TARGET, check_engine, serves_loreft
from axolotl_reft.serving.frontend import RefusedRequest, serve
from axolotl_reft.serving.runner import ServedModel, load_adapter
from axolotl_reft.settings.config_file import package_version

Function = Callable[..., Any]


class Patch(NamedTuple):
    """A function of vLLM that is wrapped.

    Attributes:
        owners: modules or classes that hold it, as ``module`` or ``module:Class``.
        parameters: that it takes, in order; of a property, None.
        wrap: makes the replacement from the original.
    """

    owners: tuple[str, ...]
    name: str
    parameters: str
    wrap: Callable[[Function], Function]


def _create_engine_config(original: Function) -> Function:
    """Refuses settings before the model is loaded."""

    def create_engine_config(*args: Any, **kwargs: Any) -> Any:
        vllm_config = original(*args, **kwargs)
        if serves_loreft(vllm_config):
            check_engine(vllm_config)
        return vllm_config

    return create_engine_config


def _unsupported_by_v2(original: Function) -> Function:
    """Makes vLLM choose the V1 runner, which it then says."""

    def _get_v2_model_runner_unsupported_features(self: Any) -> list[str]:
        unsupported = original(self)
        return [*unsupported, "LoReFT"] if serves_loreft(self) else unsupported

    return _get_v2_model_runner_unsupported_features


def _compute_hash(original: Function) -> Function:
    """Keeps a graph that was compiled without edits, or with those of another release,
    from being taken from the cache on disk."""

    def compute_hash(self: Any) -> str:
        if TARGET not in (self.target_modules or ()):
            return original(self)
        return f"{original(self)}-axolotl-reft-{package_version()}"

    return compute_hash


def _select_experts(original: Function) -> Function:
    """Lets experts be computed as without LoRA where no LoRA can be loaded: those that
    take LoRA need Triton, which vLLM's CPU build is without."""

    def select_unquantized_moe_backend(moe_config: Any) -> Any:
        lora_config = get_current_vllm_config().lora_config
        if lora_config is not None and set(lora_config.target_modules or ()) == {
            TARGET
        }:
            moe_config.is_lora_enabled = False
        return original(moe_config)

    return select_unquantized_moe_backend


def _process_inputs(original: Function) -> Function:
    """Checks and numbers the adapter of each request."""

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if request.lora_request is not None:
            try:
                request.lora_request = serve(self, request.lora_request)
                if is_loreft_number(request.lora_request.lora_int_id):
                    _check_request(request)
            except ValueError as error:
                raise RefusedRequest(str(error)) from error
        return request

    return process_inputs


def _check_request(request: Any) -> None:
    for given, is_set in {
        "prompt embeddings": request.prompt_embeds is not None,
        "images or other media": bool(request.mm_features),
        "a prompt that is streamed in": request.resumable,
    }.items():
        if is_set:
            raise ValueError(
                f"a LoReFT adapter cannot be used with {given}: which tokens are the "
                "prompt's was never tested there; send the whole prompt as text or ids"
            )


def _add_lora(original: Function) -> Function:
    """Loads an adapter under the number that requests will give it."""

    def add_lora(self: Any, lora_request: Any) -> Any:
        return original(self, serve(self.input_processor, lora_request, is_load=True))

    return add_lora


def _check_load_request(original: Function) -> Function:
    """Answers a refused load with 400, where an error of the engine would be 500."""

    async def _check_load_lora_adapter_request(self: Any, request: Any) -> Any:
        refused = await original(self, request)
        if refused is not None:
            return refused
        lora_request = LoRARequest(request.lora_name, 1, request.lora_path)
        try:
            serve(self.input_processor, lora_request, is_load=True)
        except ValueError as error:
            return create_error_response(
                message=str(error),
                err_type="BadRequestError",
                status_code=HTTPStatus.BAD_REQUEST,
            )
        return None

    return _check_load_lora_adapter_request


def _beam_search(original: Function) -> Function:
    """Refuses beam search, which sends each beam's answer as a longer prompt."""

    signature = inspect.signature(original)

    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments.get("lora_request")
        engine = getattr(self, "engine_client", None) or self.llm_engine
        for lora_request in given if isinstance(given, list) else [given]:
            if lora_request is not None:
                served = serve(engine.input_processor, lora_request)
                if is_loreft_number(served.lora_int_id):
                    raise ValueError(
                        f"LoReFT adapter {lora_request.lora_name!r} cannot be used "
                        "with beam search: vLLM would send each beam as a prompt, and "
                        "edits move with a prompt's end; use sampling with n, or "
                        "generate of transformers with num_beams"
                    )
        return original(self, *args, **kwargs)

    return beam_search


def _extra_keys(original: Function) -> Function:
    """Makes the key of a cached block of what is edited in it, and not of the adapter's
    name: where nothing is, adapters and base share it."""

    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> Any:
        keys, mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        lora_request = request.lora_request
        if lora_request is None or not is_loreft_number(lora_request.lora_int_id):
            return keys, mm_idx
        kept = [key for key in keys or () if key[0] != "lora"]
        adapter = lora_request.lora_int_id.to_bytes(8, "little")
        edited = _edited_tokens(request).key(adapter, start_token_idx, end_token_idx)
        if edited is not None:
            kept.append(("loreft", edited))
        return tuple(kept) or None, mm_idx

    return generate_block_hash_extra_keys


def _edited_tokens(request: Any) -> EditedTokens:
    if not hasattr(request, "loreft_tokens"):
        adapter = request.lora_request
        spec = load_spec(adapter.lora_path, adapter.lora_int_id)
        request.loreft_tokens = EditedTokens(spec, request.prompt_token_ids)
    return request.loreft_tokens


def _load_lora_model(original: Function) -> Function:
    """Gives the layers their edits, before anything is compiled."""

    def load_lora_model(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        model = original(self, model, vllm_config, device)
        if serves_loreft(vllm_config):
            self.loreft = ServedModel(model, vllm_config, device)
            self.lora_manager._adapter_manager.loreft = self.loreft
        return model

    return load_lora_model


def _choose_adapters(original: Function) -> Function:
    """Clears the rows ahead of every step, also of those that only warm up."""

    def _set_active_loras(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if hasattr(self, "loreft"):
            self.loreft.clear_rows()

    return _set_active_loras


def _choose_rows(original: Function) -> Function:
    """Finds the edited rows of a step."""

    def set_active_loras(
        self: Any, input_batch: Any, num_scheduled_tokens: Any, *args: Any
    ) -> None:
        original(self, input_batch, num_scheduled_tokens, *args)
        if hasattr(self, "loreft"):
            manager = self.lora_manager._adapter_manager
            self.loreft.find_rows(
                input_batch, num_scheduled_tokens, self.requests, manager
            )

    return set_active_loras


def _load_adapter(original: Function) -> Function:
    """Reads a LoReFT adapter in the place of LoRA's matrices."""

    def _load_adapter(self: Any, lora_request: Any) -> Any:
        number = lora_request.lora_int_id
        if not is_loreft_number(number):
            return original(self, lora_request)
        model = LoRAModel(number, self.lora_config.max_lora_rank, {})
        model.loreft = load_adapter(lora_request.lora_path, number)
        return model

    return _load_adapter


def _add_adapter(original: Function) -> Function:
    """Adds adapters without matrices of LoRA, which vLLM fails to merge."""

    def _add_adapter(self: Any, lora: Any) -> None:
        if lora.loras:
            original(self, lora)
        else:
            self._registered_adapters[lora.id] = lora

    return _add_adapter


def _activate_adapter(original: Function) -> Function:
    """Puts an adapter's edits into the slot that vLLM gave it."""

    def activate_adapter(self: Any, lora_id: int) -> bool:
        is_new = original(self, lora_id)
        if is_new and is_loreft_number(lora_id):
            slot = self.lora_index_to_id.index(lora_id)
            self.loreft.load(slot, self._registered_adapters[lora_id].loreft)
        return is_new

    return activate_adapter


_EXPERTS = "vllm.model_executor.layers.fused_moe"
_BLOCK_KEYS = ("vllm.v1.core.kv_cache_utils", "vllm.v1.core.block_pool")
_RUNNER = ("vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin",)
_MANAGER = ("vllm.lora.model_manager:LoRAModelManager",)
PATCHES = (
    Patch(
        ("vllm.engine.arg_utils:EngineArgs",),
        "create_engine_config",
        "self usage_context headless",
        _create_engine_config,
    ),
    Patch(
        ("vllm.config.vllm:VllmConfig",),
        "_get_v2_model_runner_unsupported_features",
        "self",
        _unsupported_by_v2,
    ),
    Patch(("vllm.config.lora:LoRAConfig",), "compute_hash", "self", _compute_hash),
    Patch(
        (
            f"{_EXPERTS}.oracle.unquantized",
            f"{_EXPERTS}.unquantized_fused_moe_method",
        ),
        "select_unquantized_moe_backend",
        "moe_config",
        _select_experts,
    ),
    Patch(
        ("vllm.v1.engine.input_processor:InputProcessor",),
        "process_inputs",
        "self request_id prompt params supported_tasks arrival_time lora_request "
        "tokenization_kwargs trace_headers priority data_parallel_rank resumable "
        "session_id kv_hints",
        _process_inputs,
    ),
    Patch(
        ("vllm.v1.engine.async_llm:AsyncLLM", "vllm.v1.engine.llm_engine:LLMEngine"),
        "add_lora",
        "self lora_request",
        _add_lora,
    ),
    Patch(
        ("vllm.entrypoints.openai.models.serving:OpenAIServingModels",),
        "_check_load_lora_adapter_request",
        "self request",
        _check_load_request,
    ),
    Patch(
        ("vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin",),
        "beam_search",
        "self prompt request_id params lora_request trace_headers session_id",
        _beam_search,
    ),
    Patch(
        ("vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin",),
        "beam_search",
        "self prompts params lora_request use_tqdm concurrency_limit",
        _beam_search,
    ),
    Patch(
        _BLOCK_KEYS,
        "generate_block_hash_extra_keys",
        "request start_token_idx end_token_idx start_mm_idx",
        _extra_keys,
    ),
    Patch(
        _RUNNER, "load_lora_model", "self model vllm_config device", _load_lora_model
    ),
    Patch(
        _RUNNER,
        "_set_active_loras",
        "self prompt_lora_mapping token_lora_mapping lora_requests mapping_type",
        _choose_adapters,
    ),
    Patch(
        _RUNNER,
        "set_active_loras",
        "self input_batch num_scheduled_tokens num_sampled_tokens mapping_type",
        _choose_rows,
    ),
    Patch(
        ("vllm.lora.worker_manager:WorkerLoRAManager",),
        "_load_adapter",
        "self lora_request",
        _load_adapter,
    ),
    Patch(_MANAGER, "_add_adapter", "self lora", _add_adapter),
    Patch(_MANAGER, "activate_adapter", "self lora_id", _activate_adapter),
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
