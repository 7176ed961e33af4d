"""4- and 8-bit bases: what axolotl does for ``lora`` and ``qlora`` alone.

For a plugin's adapter, axolotl reads ``load_in_8bit`` and ``load_in_4bit`` and loads
the base in full precision without a word. The way in is its ``model_kwargs``, which
reach ``from_pretrained``: they are filled in validation, completed when the compute
dtype is known, and the model that comes out is looked at.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from packaging.version import Version
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from axolotl_reft.errors import did_you_mean
from axolotl_reft.tuner.model import find_decoder_layers

LOG = get_logger(__name__)

_ASKED = {"load_in_8bit": "Linear8bitLt", "load_in_4bit": "Linear4bit"}
# As axolotl's for qlora, with the compute dtype to come. Its storage dtype is not taken
# over: it is for FSDP, and `axolotl inference` casts stored floats.
_LIKE_QLORA = {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"}
# What axolotl leaves alone in 8- and 4-bit, by model type.
_SKIPPED = {"jamba": ["mamba"], "falcon_h1": ["out_proj"]}
_FIELDS = tuple(inspect.signature(BitsAndBytesConfig).parameters)[:-1]
_QUANT_TYPES = ("nf4", "fp4")
# transformers' quantizers whose is_trainable is False, and axolotl's names for two.
_NOT_TRAINABLE = (
    "FineGrainedFP8Config",
    "Mxfp4Config",
    "auto-round",
    "fbgemm_fp8",
    "fp8",
    "higgs",
    "metal",
    "mxfp4",
    "nvfp4",
    "quark",
    "spqr",
    "vptq",
)
_OPTIMUM_FOR_GPTQ = Version("1.24.0")
# A module without which transformers fails when it has begun to load the base, and what
# to install for it. gptqmodel 7.7 needs a newer torch than axolotl 0.19 takes.
_NEEDED = {
    "awq": ("gptqmodel", "gptqmodel<7.7"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
}


def asked_for(settings: Mapping[str, Any]) -> str | None:
    """``load_in_8bit`` or ``load_in_4bit``, where the config sets it."""
    return next((key for key in _ASKED if settings.get(key)), None)


def check_quantisation(settings: Mapping[str, Any]) -> None:
    """Refuse what cannot be had of the settings that quantise the base.

    Raises:
        ValueError: the setting, what it is, why not, and the remedy.
    """
    for name, value in settings.items():
        if name.startswith(("bnb_4bit_", "llm_int8_")):
            raise ValueError(
                f"{name}: is not a key at the top of the config; write it into a block"
                f"\nbnb_config_kwargs:\n  {name}: {value}"
            )
    key = asked_for(settings)
    extra = settings.get("bnb_config_kwargs")
    if key is None:
        if extra:
            raise ValueError(
                f"bnb_config_kwargs: {dict(extra)} would do nothing without "
                "load_in_4bit or load_in_8bit; set one of them, or remove it"
            )
        return
    if settings.get("load_in_8bit") and settings.get("load_in_4bit"):
        raise ValueError(
            "load_in_8bit and load_in_4bit are both true, and a base has one width; "
            "keep one of them"
        )
    _check_bnb_settings(extra or {})
    if sharded := _sharded(settings):
        raise ValueError(
            f"{key}: true with {sharded}: axolotl arranges quantised bases under "
            "FSDP for adapter: qlora alone; remove one of the two. Without FSDP, "
            "each process holds the whole base, in 8 or 4 bits"
        )
    given = _given_config(settings)
    if given is not None and not _is_ours(given, quantization_config(settings)):
        raise ValueError(
            f"{key}: true beside model_kwargs: quantization_config: {given}: both say "
            "how to quantise the base; remove one of them"
        )


def check_quantised_base(
    settings: Mapping[str, Any], model_config: Any, training: bool
) -> None:
    """Refuse a base that is quantised already, where it cannot be used so.

    Args:
        model_config: the base's transformers config.

    Raises:
        ValueError: the base's method, and the remedy.
    """
    base = getattr(model_config, "quantization_config", None) or {}
    base = base if isinstance(base, Mapping) else base.to_dict()
    method = base.get("quant_method") or settings.get("model_quantization_config")
    if method is None:
        return
    key = asked_for(settings)
    if key and not (method == "bitsandbytes" and base.get(key)):
        raise ValueError(
            f"{key}: true, but the base is quantised with {method} already; remove "
            f"{key}, or set base_model to the full-precision one"
        )
    if method == "gptq" and Version(version("optimum")) < _OPTIMUM_FOR_GPTQ:
        raise ValueError(
            "the base is quantised with gptq, for which transformers needs optimum "
            f"{_OPTIMUM_FOR_GPTQ} or newer, and this axolotl pins {version('optimum')};"
            " set base_model to the full-precision one, and load_in_4bit: true"
        )
    module, package = _NEEDED.get(str(method), (None, None))
    if module and find_spec(module) is None:
        raise ValueError(
            f"the base is quantised with {method}, which transformers loads with the "
            f"module {module}, and it is not installed; pip install '{package}', or "
            "set base_model to the full-precision one, and load_in_4bit: true"
        )
    dequantised = settings.get("model_quantization_config_kwargs") or base
    if not training or dequantised.get("dequantize"):
        return
    if sharded := _sharded(settings):
        raise ValueError(
            f"{sharded} with a base that is quantised with {method}: FSDP cannot shard "
            "its packed numbers; remove one of the two. Without FSDP, each process "
            "holds the whole base"
        )
    if method in _NOT_TRAINABLE:
        raise ValueError(
            f"the base is quantised with {method}, through which transformers cannot "
            "train; set base_model to the full-precision one, and load_in_8bit or "
            "load_in_4bit: true"
        )


def _sharded(settings: Mapping[str, Any]) -> str | None:
    return next((key for key in ("fsdp", "fsdp_config") if settings.get(key)), None)


def _check_bnb_settings(extra: Mapping[str, Any]) -> None:
    for name in extra:
        if name not in _FIELDS:
            raise ValueError(
                f"bnb_config_kwargs: unknown key {name!r}.{did_you_mean(name, _FIELDS)}"
                f" Known keys: {', '.join(_FIELDS)}"
            )
    kind = extra.get("bnb_4bit_quant_type", "nf4")
    if kind not in _QUANT_TYPES:
        raise ValueError(
            f"bnb_config_kwargs: bnb_4bit_quant_type: {kind!r} is unknown; choose one "
            f"of: {', '.join(_QUANT_TYPES)}"
        )
    try:
        BitsAndBytesConfig(load_in_4bit=True, **_without_widths(extra))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"bnb_config_kwargs: {dict(extra)} is not understood: {error}"
        ) from error


def _without_widths(extra: Mapping[str, Any]) -> dict[str, Any]:
    for key in _ASKED:
        if key in extra:
            raise ValueError(f"{key} belongs at the top of the config")
    return dict(extra)


def quantization_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``BitsAndBytesConfig`` that is asked for, in plain values.

    Plain, so that the validated config can be dumped and validated again; the compute
    dtype is left to :func:`complete`, unless the config names one.
    """
    key = asked_for(settings)
    assert key is not None
    like_qlora = _LIKE_QLORA if key == "load_in_4bit" else {}
    extra = settings.get("bnb_config_kwargs") or {}
    return {"quant_method": "bitsandbytes", key: True} | like_qlora | dict(extra)


def with_quantization(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """axolotl's ``model_kwargs`` that load the base as asked; the same ones if set."""
    kwargs = settings.get("overrides_of_model_kwargs")
    if asked_for(settings) is None or _given_config(settings) is not None:
        return kwargs
    return dict(kwargs or {}) | {"quantization_config": quantization_config(settings)}


def _given_config(settings: Mapping[str, Any]) -> Any:
    kwargs = settings.get("overrides_of_model_kwargs") or settings.get("model_kwargs")
    return (kwargs or {}).get("quantization_config")


def _is_ours(given: Any, ours: dict[str, Any]) -> bool:
    if not isinstance(given, Mapping):
        return False
    completed = ("bnb_4bit_compute_dtype", "llm_int8_skip_modules")
    return {k: v for k, v in given.items() if k in ours or k not in completed} == ours


def complete(cfg: Any) -> None:
    """Add what is known only now: the compute dtype, and what must not be quantised.

    In place: axolotl's loader has taken the mapping itself by then.
    """
    if asked_for(cfg) is None:
        return
    config = cfg.overrides_of_model_kwargs["quantization_config"]
    if cfg.load_in_4bit:
        config.setdefault("bnb_4bit_compute_dtype", _name(cfg.torch_dtype))
    if skipped := _SKIPPED.get(cfg.model_config_type):
        config.setdefault("llm_int8_skip_modules", skipped)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def finish_base(cfg: Any, model: PreTrainedModel, training: bool) -> None:
    """See that the base was quantised as asked, and prepare it as PEFT does.

    Frozen, and what is not quantised in float32, of which axolotl then casts norms and
    embeddings to its dtype; so a quantised LoReFT base is a qlora base. Without PEFT's
    gradients of the inputs: backward need not reach below the lowest edited layer.

    Raises:
        ValueError: no layer of it is quantised, or gradients do not pass one.
    """
    if key := asked_for(cfg):
        _check_layers(key, model)
    method = getattr(model, "quantization_method", None)
    if method == "bitsandbytes" and not is_deepspeed_zero3_enabled():
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if method == "awq" and training:
        _check_backward(model)
    if method == "compressed-tensors":
        LOG.warning(
            "the base is stored in compressed-tensors, which unpacks it at the first "
            "forward: it takes the memory of the full-precision one, in %s. For less, "
            "set base_model to that one, and load_in_4bit: true",
            model.dtype,
        )


def _check_layers(key: str, model: PreTrainedModel) -> None:
    _, layers = find_decoder_layers(model)
    modules: list[Any] = list(layers.modules())
    # bitsandbytes is no dependency of axolotl's everywhere, so it is known by name.
    quantised = [m for m in modules if type(m).__name__ == _ASKED[key]]
    if not quantised or not all(_is_packed(module) for module in quantised):
        raise ValueError(
            f"{key}: true, but no linear layer of the base was quantised when it was "
            f"loaded, and it would be trained on in {model.dtype}; remove {key}, or "
            "what keeps the base from being quantised (such as reinit_weights)"
        )
    bits = 4 if key == "load_in_4bit" else 8
    LOG.info("the base is quantised: %d linear layers in %d bits", len(quantised), bits)
    left = sum(_matrix_numbers(set(modules) - set(quantised)))
    whole = left + sum(m.in_features * m.out_features for m in quantised)
    if left > 0.1 * whole:
        LOG.warning(
            "%s: %d%% of the weights of the base's layers are not quantised: "
            "bitsandbytes quantises linear layers, and not, for example, the fused "
            "experts of a mixture",
            key,
            100 * left / whole,
        )


def _check_backward(model: PreTrainedModel) -> None:
    """See that each of gptqmodel's layers hands gradients down.

    Some of its kernels compute without a graph. The one for CPUs does so for ever when
    its first forward is one of evaluation, so the first one is a training step's, here.
    """
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            inputs = torch.zeros(
                (1, module.in_features),
                dtype=model.dtype,
                device=module.qweight.device,
                requires_grad=True,
            )
            if not module.train()(inputs).requires_grad:
                raise ValueError(
                    f"{name} of the base is gptqmodel's {type(module).__name__}, "
                    "which computes no gradients of its inputs: the layers below would "
                    "learn from a part of the loss. Set base_model to the "
                    "full-precision one, and load_in_4bit: true"
                )


def _is_packed(module: Any) -> bool:
    """Stored in 8 bits, or in 4 with their statistics."""
    weight = module.weight
    return weight.itemsize == 1 or getattr(weight, "quant_state", None) is not None


def _matrix_numbers(modules: Iterable[nn.Module]) -> Iterable[int]:
    for module in modules:
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                yield parameter.numel()
