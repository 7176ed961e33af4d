"""vLLM engines on tiny random bases, compared with transformers request by request."""

import gc
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Before vllm is imported: the engine in this process, and none of its core binding.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import registry

from axolotl_reft import LoreftConfig

# vLLM looks at a model's class in a process of its own, which imports all anew.
registry._run_in_subprocess = lambda look: look()

VOCABULARY = 512
LAYERS = 4
# The mark that ends a prompt, and the token that ends a turn.
MARK, END = [10, 11], 12
_MARKERS = {"generation_prompts": [MARK], "end_of_turn": [END]}
# Every intervention; tied and untied; each kind of positions, of ranks and of turns.
ADAPTERS: dict[str, dict[str, Any]] = {
    "first_and_last": {"positions": "f7+l7", "rank": 4},
    "untied": {"positions": "f3+l5", "rank": 8, "tied_weights": False},
    "last_of_two_layers": {"positions": "l1", "rank": 2, "layers": [1, 3]},
    "last": {"positions": "l7", "rank": 4},
    "direft_first": {"positions": "f5", "rank": 4, "intervention": "direft"},
    "all": {"positions": "all", "rank": 2},
    "noreft": {"positions": "f7+l7", "rank": 4, "intervention": "noreft"},
    "orthogonal_direft": {
        "positions": "f2+l2",
        "rank": 4,
        "intervention": "orthogonal_direft",
    },
    "consreft": {"positions": "f7+l7", "rank": 4, "intervention": "consreft"},
    "lobireft": {"positions": "l3", "rank": 4, "intervention": "lobireft"},
    "every_turn": {
        "positions": "f2+l3",
        "rank": {"0": 2, "all": 4},
        "turn_markers": _MARKERS,
    },
    "first_turn": {
        "positions": "f2+l3",
        "rank": 4,
        "turn_markers": _MARKERS,
        "turns": "first",
    },
}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    # vLLM's attention on a CPU takes heads of 32, 64 and some larger sizes.
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# Of logits and logprobs, in float32 (the largest found is a tenth of it).
ROUNDING = 2e-4


class Asked(NamedTuple):
    """A request; without an adapter, of the base."""

    adapter: str | None
    prompt: list[int]
    strength: float = 1.0  # the extra argument is there where it is not 1


class Answer(NamedTuple):
    """What an engine gave: tokens, their logprobs, those of the prompt if asked for,
    how many tokens of the prompt came from the cache, and whether those of the answer
    are other than the likeliest on purpose."""

    asked: Asked
    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    cached: int
    sampled: bool


class Comparison(NamedTuple):
    """How many requests were compared, how many differ, the largest difference of a
    logprob, and how many would differ from the base alone."""

    requests: int
    different: int
    largest: float
    edited: int


def save_base(directory: Path, architecture: str = "llama", **overrides: Any) -> None:
    """Save a random model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **_SIZES | overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory / "base")


def save_adapters(directory: Path, names: Iterable[str] = ADAPTERS) -> None:
    """Save random adapters of the base there that change its answers much."""
    base = str(directory / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name in names:
        torch.manual_seed(1 + list(ADAPTERS).index(name))
        config = LoreftConfig(task_type="CAUSAL_LM", **ADAPTERS[name])
        config.base_model_name_or_path = base
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    scale = 0.8 if parameter.ndim == 1 else 0.15
                    parameter.add_(torch.randn_like(parameter) * scale)
        adapted.save_pretrained(directory / name)
        model = adapted.unload()


def start(directory: Path, **settings: Any) -> LLM:
    """Start an engine that serves adapters of the base there."""
    defaults = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enable_lora": True,
        "lora_target_modules": ["loreft"],
        "max_loras": 4,
        "max_cpu_loras": 4,
        "max_lora_rank": 8,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "block_size": 32,
        "seed": 0,
        "disable_log_stats": False,
    }
    return LLM(str(directory / "base"), **defaults | settings)


def stop(llm: LLM) -> None:
    """Free an engine's memory, and what it set for the process."""
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def ask(
    llm: LLM, directory: Path, asked: Sequence[Asked], **settings: Any
) -> list[Answer]:
    """Send requests in one call; of several answers to one, each is returned."""
    defaults = {"temperature": 0, "max_tokens": 8, "logprobs": 1, "ignore_eos": True}
    sampling = SamplingParams(detokenize=False, **defaults | settings)
    outputs = llm.generate(
        [{"prompt_token_ids": request.prompt} for request in asked],
        [_at_strength(sampling, request.strength) for request in asked],
        lora_request=[lora_request(directory, request.adapter) for request in asked],
        use_tqdm=False,
    )
    return [
        Answer(
            request,
            list(completion.token_ids),
            _chosen(completion.token_ids, completion.logprobs),
            _chosen(request.prompt[1:], output.prompt_logprobs[1:])
            if output.prompt_logprobs
            else [],
            output.num_cached_tokens,
            sampling.temperature > 0,
        )
        for request, output in zip(asked, outputs, strict=True)
        for completion in output.outputs
    ]


def _at_strength(sampling: SamplingParams, strength: float) -> SamplingParams:
    sampling = sampling.clone()
    if strength != 1:
        sampling.extra_args = {"loreft_strength": strength}
    return sampling


def lora_request(directory: Path, adapter: str | None) -> LoRARequest | None:
    """Return vLLM's request for an adapter in the directory."""
    if adapter is None:
        return None
    # The same number for all: those of LoReFT are made from their files.
    return LoRARequest(adapter, 1, str(directory / adapter))


def _chosen(tokens: Sequence[int], logprobs: Sequence[Any]) -> list[float]:
    return [found[token].logprob for token, found in zip(tokens, logprobs, strict=True)]


def prompts(lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    """Return prompts of these lengths, without marks of turns."""
    draw = random.Random(seed)
    return [[draw.randrange(20, 500) for _ in range(length)] for length in lengths]


def conversation(lengths: Iterable[int], seed: int = 0) -> list[int]:
    """Return a conversation whose turns' questions and answers have these lengths, up
    to the mark that asks for the next answer."""
    ids: list[int] = []
    turns = zip(prompts(lengths, seed), prompts(lengths, seed + 1), strict=True)
    for question, answer in turns:
        ids += [*question, *MARK, *answer, END]
    return [*ids, *prompts([5], seed + 2)[0], *MARK]


def every(
    texts: Iterable[list[int]], adapters: Iterable[str | None] = (None, *ADAPTERS)
) -> list[Asked]:
    """Return every prompt with every adapter, in a mixed order."""
    texts = list(texts)
    asked = [Asked(adapter, text) for adapter in adapters for text in texts]
    random.Random(len(asked)).shuffle(asked)
    return asked


class Reference:
    """The base and its adapters in transformers."""

    def __init__(
        self,
        directory: Path,
        adapters: Iterable[str] = ADAPTERS,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        first, *others = adapters
        # Gemma 2's scores are capped in the eager attention alone.
        base = AutoModelForCausalLM.from_pretrained(
            directory / "base", dtype=dtype, attn_implementation="eager"
        )
        self.model = PeftModel.from_pretrained(base, directory / first, first).eval()
        for name in others:
            self.model.load_adapter(directory / name, name)

    @torch.no_grad()
    def logprobs(
        self,
        adapter: str | None,
        prompt: list[int],
        answer: list[int],
        strength: float = 1.0,
    ) -> torch.Tensor:
        """Return the logprobs of every token that can follow each of them."""
        ids = torch.tensor([prompt + answer])
        if adapter is None:
            with self.model.disable_adapter():
                logits = self.model(input_ids=ids).logits
        else:
            self.model.set_adapter(adapter)
            if hasattr(self.model, "set_scale"):  # not with LoRA's adapters
                self.model.set_scale(adapter, strength)
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            logits = self.model(input_ids=ids, labels=labels).logits
        return logits[0].float().log_softmax(-1)

    def compare(
        self, answers: Iterable[Answer], rounding: float = ROUNDING
    ) -> Comparison:
        """Compare answers with what the model gives behind the same tokens."""
        requests = different = edited = 0
        largest = 0.0
        for answer in answers:
            margin, logprob = self.differences(answer, answer.asked.adapter)
            requests += 1
            different += max(margin, logprob) > rounding
            edited += max(self.differences(answer, None)) > rounding
            largest = max(largest, logprob)
        return Comparison(requests, different, largest, edited)

    def differences(self, answer: Answer, adapter: str | None) -> tuple[float, float]:
        """Return how far the tokens are below the argmax, if they were not sampled, and
        the largest difference of a logprob, also of the prompt's."""
        prompt, tokens = answer.asked.prompt, answer.tokens
        all_TV = self.logprobs(adapter, prompt, tokens, answer.asked.strength)
        next_T = torch.tensor([*prompt, *tokens])[1:]
        chosen_T = all_TV[:-1].gather(1, next_T[:, None]).squeeze(1)
        given_T = torch.tensor([*answer.prompt_logprobs, *answer.logprobs])
        expected_T = chosen_T[len(chosen_T) - len(given_T) :]
        answer_TV = all_TV[len(prompt) - 1 : -1]
        margin_T = answer_TV.amax(1) - chosen_T[len(prompt) - 1 :]
        margin = 0.0 if answer.sampled else margin_T.max().item()
        return margin, (expected_T - given_T).abs().max().item()


def run_apart(script: str, *arguments: Any) -> None:
    """Run a test module as a program, which finds what this process finds."""
    finished = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
