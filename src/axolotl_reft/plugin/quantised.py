"""Load the base in 4 or 8 bits, as axolotl does for ``lora`` and ``qlora`` alone.

For a plugin's adapter, axolotl reads ``load_in_8bit`` and ``load_in_4bit`` and loads
the base in full precision without a warning. Its ``model_kwargs`` do reach
``from_pretrained``: they are filled in validation, completed when the compute dtype is
known, and the loaded model is checked.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from axolotl_reft.errors import did_you_mean
from axolotl_reft.plugin.rules import Config, Table
from axolotl_reft.tuner.model import find_decoder_layers

LOG = get_logger(__name__)

_SHARDING = ("fsdp", "fsdp_config")
_LAYERS = {"load_in_8bit": "Linear8bitLt", "load_in_4bit": "Linear4bit"}
# As axolotl's for qlora, with the compute dtype to come. Its storage dtype is not taken
# over: it is for FSDP, and `axolotl inference` casts stored floats.
_LIKE_QLORA = {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"}
# What axolotl leaves alone in 8- and 4-bit, by model type.
_SKIPPED = {"jamba": ["mamba"], "falcon_h1": ["out_proj"]}
_FIELDS = tuple(inspect.signature(BitsAndBytesConfig).parameters)[:-1]
_QUANT_TYPES = ("nf4", "fp4")


def asked_width(settings: Mapping[str, Any]) -> str | None:
    """``load_in_8bit`` or ``load_in_4bit``, where the config sets it."""
    return next((key for key in _LAYERS if settings.get(key)), None)


def sharding(settings: Mapping[str, Any]) -> str | None:
    """``fsdp`` or ``fsdp_config``, where the config sets it."""
    return next((key for key in _SHARDING if settings.get(key)), None)


def _is_sharded_by(key: str, config: Config) -> bool:
    return sharding(config.settings) == key


def _misplaced_setting(config: Config) -> str | None:
    for key, value in config.settings.items():
        if str(key).startswith(("bnb_4bit_", "llm_int8_")):
            return f"{key}: {value}"
    return None


def _second_config(config: Config) -> str | None:
    """A quantization_config of the user's own."""
    given = _given_config(config.settings)
    ours = quantization_config(config.settings)
    # What `complete` adds is ours too, where the completed config is validated again.
    added = ("bnb_4bit_compute_dtype", "llm_int8_skip_modules")
    if given is None or given == {k: given[k] for k in added if k in given} | ours:
        return None
    return f"model_kwargs: quantization_config: {given}"


REFUSALS = (
    Table("adapter: loreft", {
        _misplaced_setting: "it is not a key at the top of the config; write it "
        "into the block bnb_config_kwargs:",
    }),
    Table("adapter: loreft", {
        "bnb_config_kwargs": "it would do nothing without load_in_4bit or "
        "load_in_8bit; set one of them, or remove it",
    }, when=lambda config: not asked_width(config.settings)),
    Table("load_in_4bit: true", {
        "load_in_8bit": "they are both true, and a base has one width; keep one",
    }, when=lambda config: config.get("load_in_4bit")),
    Table("load_in_4bit or load_in_8bit", {
        _second_config: "both say how to quantise the base; remove one of them",
    }, when=lambda config: asked_width(config.settings)),
    *(Table(sharded, {
        key: "axolotl arranges quantised bases under FSDP for adapter: qlora alone; "
        "remove one of the two. Without FSDP, each process holds the whole base, in 8 "
        "or 4 bits"
        for key in ("load_in_4bit", "load_in_8bit")
    }, when=partial(_is_sharded_by, sharded)) for sharded in _SHARDING),
)  # fmt: skip


def check_bnb_config(extra: Mapping[str, Any]) -> None:
    """Refuse ``bnb_config_kwargs`` that bitsandbytes would not follow.

    Raises:
        ValueError: the setting, what it is, why not, and the remedy.
    """
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
    if width := asked_width(extra):
        raise ValueError(f"bnb_config_kwargs: {width} belongs at the top of the config")
    try:
        BitsAndBytesConfig(load_in_4bit=True, **extra)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"bnb_config_kwargs: {dict(extra)} is not understood: {error}"
        ) from error


def quantization_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``BitsAndBytesConfig`` that is asked for, in plain values.

    Plain, so that the validated config can be dumped and validated again; the compute
    dtype is left to :func:`complete`, unless the config names one.
    """
    key = asked_width(settings)
    assert key is not None
    like_qlora = _LIKE_QLORA if key == "load_in_4bit" else {}
    extra = settings.get("bnb_config_kwargs") or {}
    return {"quant_method": "bitsandbytes", key: True} | like_qlora | dict(extra)


def with_quantization(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """axolotl's ``model_kwargs`` that load the base as asked; the same ones if set."""
    kwargs = settings.get("overrides_of_model_kwargs")
    if asked_width(settings) is None or _given_config(settings) is not None:
        return kwargs
    return dict(kwargs or {}) | {"quantization_config": quantization_config(settings)}


def _given_config(settings: Mapping[str, Any]) -> Any:
    kwargs = settings.get("overrides_of_model_kwargs") or settings.get("model_kwargs")
    return (kwargs or {}).get("quantization_config")


def complete(cfg: Any) -> None:
    """Add what is known only now: the compute dtype, and what must not be quantised.

    In place: axolotl's loader has taken the mapping itself by then.
    """
    if asked_width(cfg) is None:
        return
    config = cfg.overrides_of_model_kwargs["quantization_config"]
    if cfg.load_in_4bit:
        dtype = str(cfg.torch_dtype).removeprefix("torch.")
        config.setdefault("bnb_4bit_compute_dtype", dtype)
    if skipped := _SKIPPED.get(cfg.model_config_type):
        config.setdefault("llm_int8_skip_modules", skipped)


def finish_base(cfg: Any, model: PreTrainedModel, training: bool) -> None:
    """Check that the base was quantised as asked, and prepare it as PEFT does.

    PEFT freezes it and casts what is not quantised to float32; axolotl then casts norms
    and embeddings to its dtype, as for qlora. Inputs need no gradients: backward stops
    at the lowest edited layer.

    Raises:
        ValueError: no layer of it is quantised, or gradients do not pass one.
    """
    if key := asked_width(cfg):
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
    quantised = [m for m in modules if type(m).__name__ == _LAYERS[key]]
    if not quantised or not all(_is_packed(module) for module in quantised):
        raise ValueError(
            f"{key}: true, but no linear layer of the base was quantised when it was "
            f"loaded, and it would be trained on in {model.dtype}; remove {key}, or "
            "what keeps the base from being quantised (such as reinit_weights)"
        )
    bits = 4 if key == "load_in_4bit" else 8
    LOG.info("the base is quantised: %d linear layers in %d bits", len(quantised), bits)
    left = sum(_matrix_sizes(set(modules) - set(quantised)))
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
    """Check that each of gptqmodel's layers computes gradients of its inputs.

    Some of its kernels compute without a graph. The one for CPUs does so forever when
    its first forward is in evaluation mode, so the first one is in training mode here.
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
    """Whether the weight is stored in 8 bits, or in 4 with its statistics."""
    weight = module.weight
    return weight.itemsize == 1 or getattr(weight, "quant_state", None) is not None


def _matrix_sizes(modules: Iterable[nn.Module]) -> Iterable[int]:
    for module in modules:
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                yield parameter.numel()
