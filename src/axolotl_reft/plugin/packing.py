"""A warning, before training, of a base that does not keep packed samples apart."""

from __future__ import annotations

import warnings

import torch
from axolotl.monkeypatch.models.mamba_utils import mamba2_seq_idx_kernels_available
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from transformers import PreTrainedModel

from axolotl_reft.tuner.packing import what_joins_samples

LOG = get_logger(__name__)

# Bases that axolotl tells of packed samples on a GPU: with the kernels of
# flash-linear-attention, without which it raises, or of mamba-ssm.
_WITH_FLA = {
    "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text",
    "qwen4_exp", "qwen4_exp_text",
}  # fmt: skip
_WITH_MAMBA = {"nemotron_h", "falcon_h1", "granitemoehybrid"}


def warn_of_packing(cfg: DictDefault, model: PreTrainedModel) -> None:
    """Warn where the config packs samples and the base joins them."""
    key = next((k for k in ("sample_packing", "batch_flattening") if cfg[k]), None)
    joining, kind = what_joins_samples(model), model.config.model_type
    if key is None or not joining:
        return
    # It was said here, or axolotl sees to it.
    warnings.filterwarnings("ignore", "LoReFT: packed samples are not kept apart")
    has_kernels = kind in _WITH_MAMBA and mamba2_seq_idx_kernels_available()
    if torch.cuda.is_available() and (kind in _WITH_FLA or has_kernels):
        return
    package = "flash-linear-attention" if kind in _WITH_FLA else ""
    if kind in _WITH_MAMBA:
        package = "mamba-ssm and causal-conv1d"
    LOG.warning(
        "%s: packed samples are not kept apart by %s of the base, with or without an "
        "adapter; set %s: false%s",
        *(key, joining, key),
        package and f", or train on a GPU with {package} installed",
    )
