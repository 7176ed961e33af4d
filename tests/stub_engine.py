"""Stand-ins for what vLLM hands over: its configuration, a model, a step's batch."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

HIDDEN, LAYERS, CAPACITY = 16, 3, 64


class LlamaDecoderLayer(nn.Module):
    """As vLLM's: its update, and the residual stream that it is to be added to."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden_TD, residual_TD):
        sum_TD = hidden_TD + (0 if residual_TD is None else residual_TD)
        return self.linear(sum_TD), sum_TD


class GPTNeoXLayer(nn.Module):
    """As transformers': its output."""

    __module__ = "transformers.models.gpt_neox.modeling_gpt_neox"

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden_1TD):
        return hidden_1TD + self.linear(hidden_1TD)


def build_layers(layer_class=LlamaDecoderLayer, count=LAYERS):
    torch.manual_seed(0)
    return nn.ModuleList(layer_class() for _ in range(count))


def build_config(architecture="LlamaForCausalLM", **changes):
    """An engine's configuration that can be served, but for ``changes``, whose keys are
    paths such as ``parallel_config.enable_expert_parallel``."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model="base",
            get_hidden_size=lambda: HIDDEN,
            hf_config=SimpleNamespace(architectures=[architecture]),
            hf_text_config=SimpleNamespace(num_hidden_layers=LAYERS),
            using_transformers_backend=lambda: False,
            runner_type="generate",
            enable_sleep_mode=False,
        ),
        lora_config=SimpleNamespace(
            target_modules=["loreft"], max_loras=3, max_lora_rank=4
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=CAPACITY),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
            enable_expert_parallel=False,
            nnodes=1,
            distributed_executor_backend="mp",
        ),
        compilation_config=SimpleNamespace(
            cudagraph_mode=SimpleNamespace(name="PIECEWISE")
        ),
        device_config=SimpleNamespace(device_type="cpu"),
        use_v2_model_runner=False,
        kv_transfer_config=None,
        speculative_config=None,
    )
    for path, value in changes.items():
        *owners, name = path.split(".")
        owner = config
        for attribute in owners:
            owner = getattr(owner, attribute)
        assert hasattr(owner, name)
        setattr(owner, name, value)
    return config


def build_batch(requests):
    """vLLM's input batch of requests: each with its id, adapter's number (0 for none),
    length of the prompt and count of computed tokens; its arrays have what was there
    before it behind it."""
    ids, numbers, lengths, computed = zip(*requests, strict=True)
    return SimpleNamespace(
        num_reqs=len(ids),
        req_ids=list(ids),
        request_lora_mapping=np.array([*numbers, 2**62, 2**62]),
        num_prompt_tokens=np.array([*lengths, 20, 20], dtype=np.int32),
        num_computed_tokens_cpu=np.array([*computed, 9, 9], dtype=np.int32),
    )
