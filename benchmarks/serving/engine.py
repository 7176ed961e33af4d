"""An engine of vLLM in this process, with steps that are timed one by one."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

# Read when vLLM is imported.
for _name, _value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}.items():
    os.environ.setdefault(_name, _value)

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What --lora-target-modules is; without any, there is no --enable-lora.
TARGETS: dict[str, list[str]] = {
    "no adapters": [],
    "LoReFT": ["loreft"],
    "LoReFT and LoRA": ["loreft", *_LINEAR],
}


# Tokens of a cached block, the fewest that CPUs take, where vLLM chooses 128, and 16 on
# GPUs: the block of a prompt's last token is always computed.
BLOCK = 32
# Of a process with one thread, its own time is what it takes on an idle machine.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Times(NamedTuple):
    """Seconds of a turn: until every request has its first token, and the median of the
    steps after that; and the most tokens of a prompt that came from the cache."""

    prefill: float
    decode: float
    cached: int


class Engine:
    """An engine with some of ``TARGETS``, and the adapters in ``directories``."""

    def __init__(
        self,
        base: Path,
        targets: str,
        directories: dict[str, Path],
        compiled: bool = False,
        prefix_caching: bool = False,
        clock: str = "wall",
    ) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        of_adapters = {
            "enable_lora": True,
            "lora_target_modules": TARGETS[targets],
            "max_loras": 4,
            "max_lora_rank": 8,
        }
        llm = LLM(
            str(base),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=not compiled,
            enable_prefix_caching=prefix_caching,
            block_size=BLOCK if prefix_caching else None,
            max_model_len=2048,
            max_num_batched_tokens=2048,
            max_num_seqs=8,
            seed=0,
            disable_log_stats=True,
            **(of_adapters if TARGETS[targets] else {}),
        )
        self._engine: Any = llm.llm_engine
        self._vocabulary = self._engine.model_config.get_vocab_size()
        self._requests = {
            name: LoRARequest(name, number, str(directory))
            for number, (name, directory) in enumerate(directories.items(), 1)
        }
        self._random, self._count = random.Random(targets), 0
        self._clock = CLOCKS[clock]

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Return prompts that were not sent before."""
        ids = range(3, self._vocabulary)
        return [self._random.choices(ids, k=length) for _ in range(count)]

    def turn(self, prompts: list[list[int]], steps: int, adapter: str | None) -> Times:
        """Return the times of requests that start together and take ``steps`` more
        tokens after the first."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=steps + 1, ignore_eos=True, detokenize=False
        )
        start = self._clock()
        for prompt in prompts:
            self._count += 1
            self._engine.add_request(
                str(self._count),
                {"prompt_token_ids": prompt},
                sampling,
                lora_request=self._requests[adapter] if adapter else None,
            )
        cached: dict[str, int] = {}
        while len(cached) < len(prompts):
            for output in self._engine.step():
                cached.setdefault(output.request_id, output.num_cached_tokens or 0)
        prefill, decode = self._clock() - start, []
        while self._engine.has_unfinished_requests():
            start = self._clock()
            self._engine.step()
            decode.append(self._clock() - start)
        return Times(prefill, median(decode or [0.0]), max(cached.values()))
