"""Checks of the config against the base model's config, before its weights load."""

from __future__ import annotations

import math

from axolotl.loaders.tokenizer import load_tokenizer
from axolotl.loaders.utils import get_linear_embedding_layers
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.train import determine_last_checkpoint
from transformers import PretrainedConfig

from axolotl_reft.plugin.args import LoreftBlock, adapter_settings
from axolotl_reft.plugin.quantised import check_stored
from axolotl_reft.plugin.refusals import plain
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


def check_against_base(
    cfg: DictDefault, model_config: PretrainedConfig, training: bool = True
) -> None:
    """Raise ValueError unless layers, rank, quantisation, vocabulary and saved adapters
    fit the base. At inference a saved adapter's settings are used, not the config's."""
    text_config = model_config.get_text_config()
    hidden_size, count = text_config.hidden_size, text_config.num_hidden_layers
    block = LoreftConfig(**adapter_settings(cfg.loreft))
    check_stored(cfg, model_config, training)
    embeddings = get_linear_embedding_layers(model_config.model_type)
    if training and not set(embeddings) <= set(block.modules_to_save or ()):
        _check_vocabulary(cfg, text_config.vocab_size, embeddings)
    rank = max(block.spec().ranks(count).values())
    if as_wide_as_the_model(block.component) and rank > hidden_size:
        raise ValueError(
            f"rank: {rank} is larger than the base model's hidden size "
            f"{hidden_size}; 4 to 8 are usual"
        )
    tied = embeddings if getattr(text_config, "tie_word_embeddings", False) else []
    for setting, directory in _saved_adapters(cfg, training).items():
        saved = check_adapter_fits(directory, setting, hidden_size, count)
        if same_modules(saved.modules_to_save, block.modules_to_save, tied):
            saved.modules_to_save = block.modules_to_save
        differences = ", ".join(
            f"{key}: {plain(theirs)} (here {plain(ours)})"
            for key in adapter_settings(LoreftBlock.model_fields)
            if (theirs := getattr(saved, key)) != (ours := getattr(block, key))
        )
        message = f"{setting}: the adapter in {directory!r} has {differences}"
        if differences and training:
            raise ValueError(
                f"{message}; write the same in the loreft: block, or leave out "
                f"{setting} to train a new adapter"
            )
        if differences:
            LOG.warning("%s; the adapter's own settings are used", message)


def _check_vocabulary(cfg: DictDefault, rows: int, embeddings: list[str]) -> None:
    """Refuse to resize embeddings that are not saved with the adapter."""
    if not any(cfg[key] for key in _NEW_TOKENS):
        return
    tokens = len(load_tokenizer(cfg))
    if cfg.resize_token_embeddings_to_32x:
        tokens = math.ceil(tokens / 32) * 32
    if tokens > rows or (tokens < rows and cfg.shrink_embeddings):
        raise ValueError(
            f"the tokenizer has {tokens} tokens and the base model's embeddings "
            f"{rows} rows: axolotl resizes them, and the new rows would be lost with "
            f"the base; write loreft: modules_to_save: [{', '.join(embeddings)}]"
        )


def _saved_adapters(cfg: DictDefault, training: bool) -> dict[str, str]:
    """Return the saved adapters that the config names, by their settings."""
    named = {"lora_model_dir": cfg.lora_model_dir}
    if training and cfg.resume_from_checkpoint:
        named["resume_from_checkpoint"] = cfg.resume_from_checkpoint
    elif training and cfg.auto_resume_from_checkpoints:
        last = determine_last_checkpoint(cfg, update=False)
        named["auto_resume_from_checkpoints"] = last
    return {setting: str(value) for setting, value in named.items() if value}
