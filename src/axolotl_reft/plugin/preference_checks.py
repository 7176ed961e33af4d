"""What cannot be right beside ``adapter: loreft`` in training by preferences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_REFUSED_METHODS = {
    "gdpo": "axolotl hands TRL the adapter twice, which TRL refuses; write rl: grpo "
    "with trl.multi_objective_aggregation: normalize_then_sum, which is the same",
    "ebft": "its rollouts come from vLLM, which does not edit hidden states, or are "
    "laid in blocks under a mask of their own; use rl: grpo",
}
_BESIDE_RL = {
    "rl_adapter_ref_model": "the reference is the base with the adapter switched off, "
    "and with a second model axolotl would not save the adapter; remove it",
    "trainer_cls": "LoReFT learns from axolotl's own trainers which tokens are "
    "answers; remove it",
}
_REFUSED_TRL = {
    "use_vllm": "vLLM does not edit hidden states, so that it would answer without the "
    "adapter; set trl.use_vllm: false, and transformers generates",
    "async_prefetch": "it generates in a second thread with the model that is being "
    "trained; remove it",
    "use_data_producer": "it is made for generation by vLLM, which does not edit "
    "hidden states; remove it",
    "sync_ref_model": "TRL keeps no reference model beside an adapter; remove it",
}


def check_preference(settings: Mapping[str, Any]) -> None:
    """Refuse what does not go together with ``rl:`` and the adapter.

    Raises:
        ValueError: the setting, what it is, why not, and the remedy.
    """
    method = getattr(settings.get("rl"), "value", settings.get("rl"))
    if not method:
        return
    if method in _REFUSED_METHODS:
        raise ValueError(
            f"rl: {method} with adapter: loreft: {_REFUSED_METHODS[method]}"
        )
    for key, reason in _BESIDE_RL.items():
        if value := settings.get(key):
            raise ValueError(
                f"{key}: {str(value).lower() if value is True else value} with "
                f"adapter: loreft and rl: {method}: {reason}"
            )
    trl = settings.get("trl") or {}
    for key, reason in _REFUSED_TRL.items():
        if dict(trl).get(key):
            raise ValueError(f"trl.{key}: true with adapter: loreft: {reason}")
    if settings.get("precompute_ref_log_probs") and settings.get("lora_model_dir"):
        raise ValueError(
            "precompute_ref_log_probs: true with lora_model_dir: the reference is the "
            "adapter that training starts from, and TRL would compute its "
            "probabilities before that is loaded; remove precompute_ref_log_probs"
        )
