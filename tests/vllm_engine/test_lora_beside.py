"""LoRA's adapters and LoReFT's in the same batch."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from vllm_runs import ADAPTERS, Asked, Reference, ask, conversation, every, prompts

MODULES = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def lora(directory):
    base = AutoModelForCausalLM.from_pretrained(directory / "base")
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=MODULES)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory / "lora")
    return Reference(directory, ["lora"])


@pytest.mark.parametrize("cached", [False, True])
def test_lora_and_loreft_in_a_batch(start, directory, lora, check, cached):
    llm = start(lora_target_modules=["loreft", *MODULES], enable_prefix_caching=cached)
    texts = [*prompts((1, 3, 14, 33, 64)), conversation((9, 4))]
    asked = every(texts, (None, "lora", *ADAPTERS))
    answers = ask(llm, directory, asked) + ask(llm, directory, asked)
    if cached:
        assert sum(answer.cached for answer in answers) > 0
    by_lora = [answer for answer in answers if answer.asked.adapter == "lora"]
    others = [answer for answer in answers if answer.asked.adapter != "lora"]
    check(f"LoRA beside LoReFT, prefix caching: {cached}", by_lora, reference=lora)
    check(f"LoReFT beside LoRA, prefix caching: {cached}", others)
    with pytest.raises(ValueError, match="adapter .lora. is not LoReFT, and"):
        ask(llm, directory, [Asked("lora", texts[0], 0.5)])
