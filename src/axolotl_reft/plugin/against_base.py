"""Checks of the config against the base model's config, before its weights load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from axolotl.loaders.tokenizer import load_tokenizer
from axolotl.loaders.utils import get_linear_embedding_layers
from axolotl.utils.logging import get_logger
from axolotl.utils.train import determine_last_checkpoint
from packaging.version import Version

from axolotl_reft.plugin.args import LoreftBlock
from axolotl_reft.plugin.quantised import asked_width, sharding
from axolotl_reft.plugin.rules import plain
from axolotl_reft.saved.directory import check_adapter_fits
from axolotl_reft.settings.components import as_wide_as_the_model
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.trained_modules import same_modules

LOG = get_logger(__name__)

# Settings that make axolotl resize the embeddings.
_NEW_TOKENS = (
    "tokens", "special_tokens", "added_tokens_overrides",
    "resize_token_embeddings_to_32x", "shrink_embeddings",
)  # fmt: skip
# transformers' quantizers whose is_trainable is False, and axolotl's names for two.
_NOT_TRAINABLE = (
    "FineGrainedFP8Config", "Mxfp4Config", "auto-round", "fbgemm_fp8", "fp8", "higgs",
    "metal", "mxfp4", "nvfp4", "quark", "spqr", "vptq",
)  # fmt: skip
_FULL_PRECISION = "set base_model to the full-precision one, and load_in_4bit: true"
_OPTIMUM_FOR_GPTQ = Version("1.24.0")
# A module without which transformers fails when it has begun to load the base, and what
# to install for it. gptqmodel 7.7 needs a newer torch than axolotl 0.19 takes.
_NEEDED = {
    "awq": ("gptqmodel", "gptqmodel<7.7"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
}


def check_against_base(cfg: Any, model_config: Any, training: bool = True) -> None:
    """Check layers, rank, quantisation, vocabulary and saved adapters.

    Args:
        cfg: axolotl's config.
        model_config: the base's transformers config.
        training: False at inference, where the saved adapter's settings are used and
            those of the config that differ are only logged.

    Raises:
        ValueError: a layer or the rank is out of range; the base is quantised in a way
            that cannot be used; new embeddings would not be saved; the adapter to start
            or to resume from is missing, of another method or base, or trained with
            other settings than the config's.
    """
    text_config = model_config.get_text_config()
    hidden_size, count = text_config.hidden_size, text_config.num_hidden_layers
    block = LoreftConfig(**cfg.loreft)
    _check_quantised_base(cfg, model_config, training)
    if training:
        _check_vocabulary(cfg, block, model_config)
    rank = max(block.spec().ranks(count).values())
    if as_wide_as_the_model(block.component) and rank > hidden_size:
        raise ValueError(
            f"rank: {rank} is larger than the base model's hidden size "
            f"{hidden_size}; choose a rank of at most {hidden_size}, 4 to 8 are usual"
        )
    embeddings = get_linear_embedding_layers(model_config.model_type)
    tied = embeddings if getattr(text_config, "tie_word_embeddings", False) else []
    for setting, directory in _saved_adapters(cfg, training):
        saved = check_adapter_fits(directory, setting, hidden_size, count)
        compared = set(LoreftBlock.model_fields)
        if same_modules(saved.modules_to_save, block.modules_to_save, tied):
            compared.remove("modules_to_save")
        differences = [
            f"{key}: {plain(getattr(saved, key))} (here {plain(value)})"
            for key in LoreftBlock.model_fields
            if key in compared and getattr(saved, key) != (value := getattr(block, key))
        ]
        if not differences:
            continue
        message = f"{setting}: the adapter in {directory!r} has "
        message += ", ".join(differences)
        if training:
            raise ValueError(
                f"{message}; write the same in the loreft: block, or leave out "
                f"{setting} to train a new adapter"
            )
        LOG.warning("%s; the adapter's own settings are used", message)


def _check_vocabulary(cfg: Any, block: LoreftConfig, model_config: Any) -> None:
    """Refuse to resize embeddings that are not saved with the adapter."""
    if not any(cfg[key] for key in _NEW_TOKENS):
        return
    rows = model_config.get_text_config().vocab_size
    tokens = len(load_tokenizer(cfg))
    if cfg.resize_token_embeddings_to_32x:
        tokens = math.ceil(tokens / 32) * 32
    changed = tokens > rows or (tokens < rows and cfg.shrink_embeddings)
    embeddings = get_linear_embedding_layers(model_config.model_type)
    if changed and not set(embeddings) <= set(block.modules_to_save or ()):
        raise ValueError(
            f"the tokenizer has {tokens} tokens and the base model's embeddings "
            f"{rows} rows: axolotl resizes them, and the new rows would be lost with "
            f"the base; write loreft: modules_to_save: [{', '.join(embeddings)}]"
        )


def _saved_adapters(cfg: Any, training: bool) -> list[tuple[str, str]]:
    """Pairs of a setting that names a saved adapter and the adapter's directory."""
    named = {"lora_model_dir": cfg.lora_model_dir}
    if training:
        named["resume_from_checkpoint"] = cfg.resume_from_checkpoint
        if cfg.auto_resume_from_checkpoints and not cfg.resume_from_checkpoint:
            last = determine_last_checkpoint(cfg, update=False)
            named["auto_resume_from_checkpoints"] = last
    return [(setting, str(value)) for setting, value in named.items() if value]


def _check_quantised_base(
    settings: Mapping[str, Any], model_config: Any, training: bool
) -> None:
    """Refuse a base that is stored quantised, where it cannot be used so."""
    base = getattr(model_config, "quantization_config", None) or {}
    base = base if isinstance(base, Mapping) else base.to_dict()
    method = base.get("quant_method") or settings.get("model_quantization_config")
    if method is None:
        return
    key = asked_width(settings)
    if key and not (method == "bitsandbytes" and base.get(key)):
        raise ValueError(
            f"{key}: true, but the base is quantised with {method} already; remove "
            f"{key}, or set base_model to the full-precision one"
        )
    stored = f"the base is quantised with {method},"
    if method == "gptq" and Version(version("optimum")) < _OPTIMUM_FOR_GPTQ:
        raise ValueError(
            f"{stored} for which transformers needs optimum {_OPTIMUM_FOR_GPTQ} or "
            f"newer, and this axolotl pins {version('optimum')}; {_FULL_PRECISION}"
        )
    module, package = _NEEDED.get(str(method), ("", ""))
    if module and find_spec(module) is None:
        raise ValueError(
            f"{stored} which transformers loads with the module {module}, and it is "
            f"not installed; pip install '{package}', or {_FULL_PRECISION}"
        )
    dequantised = settings.get("model_quantization_config_kwargs") or base
    if not training or dequantised.get("dequantize"):
        return
    if sharded := sharding(settings):
        raise ValueError(
            f"{sharded} with a base that is quantised with {method}: FSDP cannot shard "
            "its packed weights; remove one of the two. Without FSDP, each process "
            "holds the whole base"
        )
    if method in _NOT_TRAINABLE:
        raise ValueError(
            f"{stored} through which transformers cannot train; {_FULL_PRECISION}"
        )
