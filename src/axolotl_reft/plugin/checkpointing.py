"""Gradient checkpointing of bases whose layers share keys and values."""

from __future__ import annotations

from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from transformers import PretrainedConfig

from axolotl_reft.tuner.checkpointing import shares_keys_and_values

LOG = get_logger(__name__)


def keep_shared_keys_and_values(
    cfg: DictDefault, model_config: PretrainedConfig
) -> None:
    """Turn reentrant checkpointing off where it would lose gradients, as axolotl does
    for some of these bases; ValueError where another kind would, too."""
    if not (cfg.gradient_checkpointing and shares_keys_and_values(model_config)):
        return
    name = f"the layers of {model_config.model_type} share keys and values"
    if cfg.activation_offloading in ("legacy", "offload_disk"):
        raise ValueError(
            f"activation_offloading: {cfg.activation_offloading}: {name}, whose "
            "gradients it loses; set activation_offloading: true, or remove it"
        )
    settings = dict(cfg.gradient_checkpointing_kwargs or {})
    if settings.get("use_reentrant") is not False:
        # axolotl's default is reentrant.
        cfg.gradient_checkpointing_kwargs = settings | {"use_reentrant": False}
        LOG.warning(
            "gradient_checkpointing_kwargs: use_reentrant: false is used: %s, whose "
            "gradients reentrant checkpointing loses",
            name,
        )
