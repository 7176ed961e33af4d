"""What is refused beside ``rl:``, with the message a user reads."""

import re

import pytest
from axolotl.utils.schemas.enums import RLType

from axolotl_reft.plugin.args import LoreftBlock
from axolotl_reft.plugin.refusals import refuse

REFUSED = [
    (
        {"rl": "gdpo"},
        "rl: gdpo with adapter: loreft: axolotl passes the adapter to TRL twice",
    ),
    ({"rl": "ebft"}, "rl: ebft with adapter: loreft: it generates under"),
    ({"rl": RLType.EBFT}, "rl: ebft with adapter: loreft: it generates"),
    (
        {"rl": "dpo", "rl_adapter_ref_model": True},
        "rl_adapter_ref_model: true with rl: dpo: the reference is the base without",
    ),
    (
        {"rl": "kto", "trainer_cls": "my.Trainer"},
        "trainer_cls: my.Trainer with rl: kto: only axolotl's own trainers",
    ),
    (
        {"rl": "grpo", "trl": {"use_vllm": True, "vllm_mode": "colocate"}},
        "trl.vllm_mode: colocate with trl.use_vllm: true: TRL builds this engine",
    ),
    (
        {"rl": "grpo", "trl": {"use_vllm": True, "vllm_lora_sync": True}},
        "trl.vllm_lora_sync: true with trl.use_vllm: true: it is for axolotl's own",
    ),
    (
        {"rl": "grpo", "trl": {"use_vllm": True, "async_prefetch": True}},
        "trl.async_prefetch: true with rl: grpo: axolotl 0.19's trainer for it calls",
    ),
    (
        {"rl": "grpo", "trl": {"use_data_producer": True}},
        "trl.use_data_producer: true with rl: grpo: axolotl 0.19's trainer for it",
    ),
    (
        {"rl": "grpo", "trl": {"sync_ref_model": True}},
        "trl.sync_ref_model: true with rl: grpo: TRL has no reference model",
    ),
    (
        {"rl": "dpo", "precompute_ref_log_probs": True, "lora_model_dir": "x"},
        "precompute_ref_log_probs: true with lora_model_dir: x: TRL would compute",
    ),
]


@pytest.mark.parametrize("positions", ["f7+l7", "all"])
@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_refused(settings, message, positions):
    with pytest.raises(ValueError, match=re.escape(message)):
        refuse(settings, LoreftBlock(positions=positions))


@pytest.mark.parametrize(
    "settings",
    [
        {"trainer_cls": "my.Trainer", "trl": {"use_vllm": True}},
        {"rl": "dpo", "precompute_ref_log_probs": True},
        {"rl": "grpo", "trl": {"use_vllm": False, "beta": 0.1}},
        {"rl": "grpo", "trl": {"use_vllm": True, "vllm_mode": "server"}},
        {"rl": "orpo", "trl": None},
    ],
)
def test_let_be(settings):
    refuse(settings, LoreftBlock())
