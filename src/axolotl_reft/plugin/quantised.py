"""Bases in 4 and 8 bits, and those that are stored quantised.

For a plugin's adapter, axolotl reads ``load_in_8bit`` and ``load_in_4bit`` and loads
the base in full precision without a warning. Its ``model_kwargs`` do reach
``from_pretrained``: they are filled in validation, completed when the compute dtype is
known, and the loaded model is checked.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from packaging.version import Version
from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from axolotl_reft.errors import did_you_mean
from axolotl_reft.tuner.model import find_decoder_layers

LOG = get_logger(__name__)

_LAYERS = {"load_in_8bit": "Linear8bitLt", "load_in_4bit": "Linear4bit"}
# As axolotl's for qlora, with the compute dtype to come. Its storage dtype is not taken
# over: it is for FSDP, and `axolotl inference` casts stored floats.
_LIKE_QLORA = {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"}
# What axolotl leaves alone in 8 and 4 bits, by model type.
_SKIPPED = {"jamba": ["mamba"], "falcon_h1": ["out_proj"]}
_FIELDS = tuple(inspect.signature(BitsAndBytesConfig).parameters)[2:-1]
# transformers' quantizers whose is_trainable is False, and axolotl's names for two.
_NOT_TRAINABLE = (
    "FineGrainedFP8Config", "Mxfp4Config", "auto-round", "fbgemm_fp8", "fp8", "higgs",
    "metal", "mxfp4", "nvfp4", "quark", "spqr", "vptq",
)  # fmt: skip
# A module without which transformers fails when it has begun to load the base, and what
# to install for it. gptqmodel 7.7 needs a newer torch than axolotl 0.19 takes.
NEEDED = {
    "awq": ("gptqmodel", "gptqmodel<7.7"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
}


def requested_bits(settings: Mapping[str, Any]) -> str | None:
    """Return ``load_in_8bit`` or ``load_in_4bit``, where the config sets it."""
    return next((key for key in _LAYERS if settings.get(key)), None)


def with_quantization(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return axolotl's ``model_kwargs``, with what loads the base as asked.

    In plain values, so that the validated config can be dumped and validated again.
    """
    kwargs = settings.get("overrides_of_model_kwargs") or settings.get("model_kwargs")
    key = requested_bits(settings)
    if key is None:
        return kwargs
    extra = settings.get("bnb_config_kwargs") or {}
    _check_bnb_config(extra)
    like_qlora = _LIKE_QLORA if key == "load_in_4bit" else {}
    ours = {"quant_method": "bitsandbytes", key: True, **like_qlora, **extra}
    given = (kwargs or {}).get("quantization_config") or ours
    # Of a config that was validated before it is ours, and perhaps completed.
    if not isinstance(given, Mapping) or {**given, **ours} != {**given}:
        raise ValueError(
            f"model_kwargs: quantization_config: {given} with {key}: true: both say "
            "how to quantise the base; remove one of the two"
        )
    return {**(kwargs or {}), "quantization_config": given}


def _check_bnb_config(extra: Mapping[str, Any]) -> None:
    try:
        for name in extra:
            if name not in _FIELDS:
                hint = did_you_mean(name, _FIELDS)
                known = ", ".join(_FIELDS)
                raise ValueError(f"unknown key {name!r}.{hint} Known keys: {known}")
        config = BitsAndBytesConfig(load_in_4bit=True, **{**_LIKE_QLORA, **extra})
        if config.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ValueError("bnb_4bit_quant_type is nf4 or fp4")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"bnb_config_kwargs: {dict(extra)}: {error}") from error


def fill_config(cfg: DictDefault) -> None:
    """Add what is known only when the base loads: the compute dtype, skipped modules.

    In place: axolotl's loader has taken the mapping itself by then.
    """
    if requested_bits(cfg) is None:
        return
    config = cfg.overrides_of_model_kwargs["quantization_config"]
    if cfg.load_in_4bit:
        dtype = str(cfg.torch_dtype).removeprefix("torch.")
        config.setdefault("bnb_4bit_compute_dtype", dtype)
    if skipped := _SKIPPED.get(cfg.model_config_type):
        config.setdefault("llm_int8_skip_modules", skipped)


def check_stored(
    settings: Mapping[str, Any], model_config: PretrainedConfig, training: bool
) -> None:
    """Refuse a base that is stored quantised, where it cannot be used so."""
    stored = getattr(model_config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, Mapping) else stored.to_dict()
    method = stored.get("quant_method") or settings.get("model_quantization_config")
    kwargs = settings.get("model_quantization_config_kwargs") or stored
    trains = training and not kwargs.get("dequantize")
    module, package = NEEDED.get(str(method), ("", ""))
    key = requested_bits(settings)
    problem = None
    if method and key and not stored.get(key):
        problem = f"{key}: true cannot quantise it again; remove {key}"
    elif method == "gptq" and Version(version("optimum")) < Version("1.24.0"):
        problem = "transformers needs optimum 1.24.0 or newer, which axolotl excludes"
    elif module and find_spec(module) is None:
        problem = f"{module} is not installed; pip install '{package}'"
    elif method and trains and (settings.get("fsdp") or settings.get("fsdp_config")):
        problem = "FSDP cannot shard its packed weights; remove fsdp_config"
    elif method in _NOT_TRAINABLE and trains:
        problem = "transformers cannot train through it"
    if problem:
        raise ValueError(
            f"the base is quantised with {method}: {problem}. Otherwise set base_model "
            "to the full-precision one (with load_in_4bit: true for less memory)"
        )


def prepare_base(cfg: DictDefault, model: PreTrainedModel, training: bool) -> None:
    """Check that the base was quantised as asked, and prepare it as PEFT does.

    PEFT freezes it and casts what is not quantised to float32; axolotl then casts norms
    and embeddings to its dtype, as for qlora. Inputs need no gradients: backward stops
    at the lowest edited layer.
    """
    if key := requested_bits(cfg):
        _check_layers(key, model)
    method = getattr(model, "quantization_method", None)
    if method == "bitsandbytes" and not is_deepspeed_zero3_enabled():
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if method == "awq" and training:
        _check_backward(model)
    if method == "compressed-tensors":
        LOG.warning(
            "compressed-tensors unpacks the base at the first forward: it takes the "
            "memory of the full-precision one. For less, set base_model to that one, "
            "and load_in_4bit: true"
        )


def _check_layers(key: str, model: PreTrainedModel) -> None:
    modules: list[Any] = list(find_decoder_layers(model)[1].modules())
    # By name: bitsandbytes is not installed wherever axolotl is.
    quantised = [m for m in modules if type(m).__name__ == _LAYERS[key]]
    # Stored in 8 bits, or in 4 with their statistics.
    packed = (
        m.weight.itemsize == 1 or getattr(m.weight, "quant_state", None) is not None
        for m in quantised
    )
    if not quantised or not all(packed):
        raise ValueError(
            f"{key}: true, but no linear layer of the base was quantised; remove it, "
            "or what prevents it (such as reinit_weights)"
        )
    bits = 4 if key == "load_in_4bit" else 8
    LOG.info("the base is quantised: %d linear layers in %d bits", len(quantised), bits)
    left = sum(
        parameter.numel()
        for module in set(modules).difference(quantised)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim > 1
    )
    share = left / (left + sum(m.in_features * m.out_features for m in quantised))
    if share > 0.1:
        LOG.warning(
            "%s: %d%% of the weights of the base's layers are not quantised: "
            "bitsandbytes quantises linear layers, not, for example, fused experts",
            key,
            100 * share,
        )


def _check_backward(model: PreTrainedModel) -> None:
    """Check that each of gptqmodel's layers computes gradients of its inputs.

    Some of its kernels compute without a graph. The one for CPUs does so forever when
    its first forward is in evaluation mode, so the first one is in training mode here.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "qweight"):
            continue
        device = module.qweight.device
        inputs = torch.zeros(1, module.in_features, dtype=model.dtype, device=device)
        if not module.train()(inputs.requires_grad_()).requires_grad:
            raise ValueError(
                f"{name} of the base is gptqmodel's {type(module).__name__}, which has "
                "no gradients of its inputs; set base_model to the full-precision one"
            )
