"""Why the tokens before the first edited one cannot be computed apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from axolotl_reft.prompts.positions import Positions
from axolotl_reft.tuner.checkpointing import shares_keys_and_values
from axolotl_reft.tuner.compat import cache_name, cache_of, forward_parameters
from axolotl_reft.tuner.context import ForwardContext, ModelState
from axolotl_reft.tuner.layout import Layout
from axolotl_reft.tuner.preamble_cache import other_caches

Inputs = dict[str, Any]

# What a backbone passes on to its layers, which do not use it.
OF_THE_HEAD = {"labels", "shift_labels", "num_items_in_batch"}
OF_TOKENS = {"input_ids", "attention_mask", "position_ids"}
# Forwards of which nobody asks why.
NOT_ASKED = "the forward goes on with a cache, or keeps one"

_ATTENTION = ("eager", "sdpa", "flash")
# Rotary embeddings that depend on the length of the whole.
_BY_LENGTH = {"dynamic", "longrope"}
# Modules that scale, or choose outliers of, all their inputs together.
_BY_BATCH = {"Linear8bitLt", "Float8Linear"}
# Of a config: what is random in training, and whose it is where it is no layer's.
_RANDOM = ("drop", "jitter")
_OF_CLASSIFIERS = ("classifier", "summary")
_KNOWN = OF_TOKENS | OF_THE_HEAD


def why_not(model: PreTrainedModel, backbones: list[Any], state: ModelState) -> str:
    """Return why a base cannot; empty where nothing is known to be in the way."""
    reasons = _of_base(model, backbones, state)
    return next((text for applies, text in reasons if applies), "")


def why_whole(
    backbone: nn.Module, state: ModelState, context: ForwardContext, inputs: Inputs
) -> str:
    """Return why a forward cannot; empty where nothing is in the way."""
    reasons = _of_forward(backbone, state, context, inputs)
    return next((text for applies, text in reasons if applies), "")


def _of_base(
    model: PreTrainedModel, backbones: list[Any], state: ModelState
) -> Iterator[tuple[object, str]]:
    backbone, config = backbones[0], model.config.get_text_config()
    name, modules = type(backbone).__name__, list(backbone.modules())
    yield (
        len(backbones) > 1,
        f"{type(model).__name__} holds a text model within another",
    )
    parameters = forward_parameters(backbone)
    taken = {
        "cache": cache_name(parameters),
        "position_ids": "position_ids" in parameters,
    }
    missing = [what for what, is_taken in taken.items() if not is_taken]
    yield missing, f"{name} takes no {' and no '.join(missing)}"
    # Encoders say so in their attention.
    bidirectional = any(getattr(m, "is_causal", True) is False for m in modules)
    yield bidirectional, f"{name} is bidirectional"
    attention = getattr(config, "_attn_implementation", None) or "eager"
    yield not attention.startswith(_ATTENTION), f"the attention is {attention}"
    layout = state.layout
    yield layout is not Layout.TOKENS_ALONE, f"hidden states are {layout.value}"
    yield shares_keys_and_values(config), "layers share keys and values"
    caches = other_caches(config)
    yield caches, f"a cache has more than keys and values ({', '.join(sorted(caches))})"
    yield backbone._is_stateful, f"layers of {name} carry a state"
    types = getattr(config, "layer_types", None) or ()
    yield "chunked_attention" in types, "attention is in chunks"
    rope = _BY_LENGTH & set(_rope_types(config))
    yield rope, f"{', '.join(rope)} rotary embeddings depend on the whole length"
    routed = getattr(config, "output_router_logits", False)
    yield routed, "the loss depends on all tokens' routing"
    kinds = _BY_BATCH & {type(module).__name__ for module in modules}
    yield kinds, f"a product of {', '.join(kinds)} depends on the whole batch"
    zero3 = any(hasattr(p, "ds_id") for p in backbone.parameters())
    yield zero3, "DeepSpeed ZeRO-3 follows the order of modules"
    fsdp1 = any(type(m).__name__ == "FullyShardedDataParallel" for m in modules)
    yield fsdp1, "FSDP1 shards the base; use fsdp_version: 2"
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    offloaded = len(devices) > 1 and devices & {"cpu", "disk"}
    yield offloaded, "a part of the base is off the device (device_map)"


def _of_forward(
    backbone: Any, state: ModelState, context: ForwardContext, inputs: Inputs
) -> Iterator[tuple[object, str]]:
    yield context.past or context.is_prepared, NOT_ASKED
    yield context.find_spans is None or context.row_adapters is not None, NOT_ASKED
    yield inputs.get("input_ids") is None, NOT_ASKED
    returns_cache = inputs.get("use_cache")
    if returns_cache is None and not torch.is_grad_enabled():
        returns_cache = getattr(backbone.config, "use_cache", False)
    yield returns_cache or cache_of(inputs) is not None, NOT_ASKED
    layer = state.layers[0]
    # A reference's forward, of which the answers are known.
    yield layer._disable_adapters and not context.find_answers, NOT_ASKED
    for name in layer._active_adapter:
        yield name not in state.adapters, NOT_ASKED
        has_lora = any(name in layer.intv_lora for layer in state.layers)
        yield has_lora, f"{name!r} has LoRA, which changes every token"
        everywhere = state.adapters[name].positions.everywhere
        # A head alone is outside of the backbone.
        has_embeddings = (
            name in state.change_every_token
            and not everywhere
            and any("modules_to_save" in path for path, _ in backbone.named_modules())
        )
        yield has_embeddings, f"{name!r} has embeddings, which change every token"
    randomness = backbone.training and _randomness_of(backbone)
    yield randomness, f"the base is random in training ({randomness})"
    for name in ("output_attentions", "output_router_logits"):
        yield inputs.get(name), f"{name} is asked for"
    yield inputs.get("return_dict") is False, "a tuple is asked for"
    yield context.edited_outputs is not None, "all hidden states are asked for"
    mask, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
    is_mask = mask is None or (mask.ndim == 2 and int(mask.max()) <= 1)
    yield not is_mask, "the attention mask is not one of 0 and 1 for each token"
    has_axes = position_ids is not None and position_ids.ndim != 2
    yield has_axes, "position ids have several axes"
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.ndim}
    unknown = ", ".join(tensors.keys() - _KNOWN)
    yield unknown, f"the model is given {unknown}"
    compiled = any(layer._compiled_call_impl for layer in state.layers)
    yield compiled, "layers are compiled"


def early_positions(positions: Positions) -> tuple[bool, str]:
    """Return whether positions leave nothing before the edited tokens, and a text."""
    early = positions.everywhere or positions.first > 0
    return early, f"positions: {positions} edits the prompt's beginning"


def _randomness_of(backbone: Any) -> str:
    """Return what is random in a base in training mode; empty for nothing."""
    for name, value in vars(backbone.config.get_text_config()).items():
        is_random = any(word in name for word in _RANDOM)
        if is_random and isinstance(value, float) and value > 0:
            if not name.startswith(_OF_CLASSIFIERS):
                return f"{name}: {value}"
    if getattr(backbone.get_input_embeddings(), "neftune_noise_alpha", None):
        return "NEFTune's noise"
    modules = backbone.named_modules()
    found = (path for path, m in modules if isinstance(m, nn.Dropout) and m.p)
    return next(found, "")


def _rope_types(config: PretrainedConfig) -> Iterator[str]:
    """Yield the types of rotary embeddings, of all kinds of layers."""
    found: list[Any] = [getattr(config, "rope_parameters", None) or {}]
    while found:
        for key, value in found.pop().items():
            if isinstance(value, dict):
                found.append(value)
            elif key in ("rope_type", "type"):
                yield value
