"""Replacements for functions of vLLM's front end, engine and scheduler.

Each takes the function that it replaces; ``patches.py`` says which that is.
"""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.entrypoints.serve import create_error_response
from vllm.lora.request import LoRARequest

from axolotl_reft.serving.adapters import is_loreft_number, load_spec
from axolotl_reft.serving.edited_tokens import STRENGTH, strength_of, tokens_of
from axolotl_reft.serving.engine import TARGET, check_engine, serves_loreft
from axolotl_reft.serving.frontend import RefusedRequest, serve
from axolotl_reft.settings.config_file import package_version
from axolotl_reft.settings.strength import read_strength

Function = Callable[..., Any]


def create_engine_config(original: Function) -> Function:
    """Refuses settings before the model is loaded."""

    def create_engine_config(*args: Any, **kwargs: Any) -> Any:
        vllm_config = original(*args, **kwargs)
        if serves_loreft(vllm_config):
            check_engine(vllm_config)
        return vllm_config

    return create_engine_config


def unsupported_by_v2(original: Function) -> Function:
    """Makes vLLM choose the V1 runner, which it then says."""

    def _get_v2_model_runner_unsupported_features(self: Any) -> list[str]:
        unsupported = original(self)
        return [*unsupported, "LoReFT"] if serves_loreft(self) else unsupported

    return _get_v2_model_runner_unsupported_features


def compute_hash(original: Function) -> Function:
    """Keeps a graph that was compiled without edits, or with those of another release,
    from being taken from the cache on disk."""

    def compute_hash(self: Any) -> str:
        if TARGET not in (self.target_modules or ()):
            return original(self)
        return f"{original(self)}-axolotl-reft-{package_version()}"

    return compute_hash


def select_experts(original: Function) -> Function:
    """Lets experts be computed as without LoRA where no LoRA can be loaded: those that
    take LoRA need Triton, which vLLM's CPU build is without."""

    def select_unquantized_moe_backend(moe_config: Any) -> Any:
        lora_config = get_current_vllm_config().lora_config
        if lora_config is not None and lora_config.target_modules == [TARGET]:
            moe_config.is_lora_enabled = False
        return original(moe_config)

    return select_unquantized_moe_backend


def process_inputs(original: Function) -> Function:
    """Checks and numbers the adapter of each request."""

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if request.lora_request is not None:
            try:
                request.lora_request = serve(self, request.lora_request)
                _check_strength(request)
                if is_loreft_number(request.lora_request.lora_int_id):
                    _check_request(request)
            except ValueError as error:
                raise RefusedRequest(str(error)) from error
        return request

    return process_inputs


def _check_strength(request: Any) -> None:
    extra = (request.sampling_params and request.sampling_params.extra_args) or {}
    for name in extra:
        if name.startswith("loreft") and name != STRENGTH:
            raise ValueError(
                f"{name} is not known among a request's extra arguments; the strength "
                f"of a LoReFT adapter is {STRENGTH}"
            )
    if STRENGTH not in extra:
        return
    read_strength(extra[STRENGTH], STRENGTH)
    if not is_loreft_number(request.lora_request.lora_int_id):
        raise ValueError(
            f"{STRENGTH}: the adapter {request.lora_request.lora_name!r} is not "
            "LoReFT, and would have its full strength; leave it out"
        )


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


def add_lora(original: Function) -> Function:
    """Loads an adapter under the number that requests will give it."""

    def add_lora(self: Any, lora_request: Any) -> Any:
        return original(self, serve(self.input_processor, lora_request, is_load=True))

    return add_lora


def check_load_request(original: Function) -> Function:
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


def beam_search(original: Function) -> Function:
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


def extra_keys(original: Function) -> Function:
    """Makes the key of a cached block of what is edited in it and how strongly, and not
    of the adapter's name: where nothing is, adapters and base share it."""

    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> Any:
        keys, mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        lora_request = request.lora_request
        if lora_request is None or not is_loreft_number(lora_request.lora_int_id):
            return keys, mm_idx
        kept = [key for key in keys or () if key[0] != "lora"]
        number = lora_request.lora_int_id
        tokens = tokens_of(request, load_spec(lora_request.lora_path, number))
        strength = strength_of(request)
        adapter = struct.pack("<qd", number, strength)
        edited = tokens.key(adapter, start_token_idx, end_token_idx)
        if edited is not None and strength != 0:
            kept.append(("loreft", edited))
        return tuple(kept) or None, mm_idx

    return generate_block_hash_extra_keys
