"""An OpenAI server of vLLM with LoReFT adapters, and what transformers answers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import requests
import torch
from chat_templates import build_byte_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import axolotl_reft
from axolotl_reft import LoreftConfig

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER = build_byte_tokenizer(
    ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"], "</s>", TEMPLATE
)
ADAPTERS: dict[str, dict[str, Any]] = {
    "ends": {"positions": "f7+l7", "rank": 4},
    "everywhere": {"positions": "all", "rank": 2},
    "turns": {
        "positions": "f2+l3",
        "rank": 8,
        "turn_markers": axolotl_reft.turn_markers(TOKENIZER),
    },
}
# Of logprobs in float32.
ROUNDING = 2e-4


def build_base(hidden_size: int = 64) -> LlamaForCausalLM:
    """A random model, whose head size vLLM's attention on a CPU takes."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=hidden_size,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=512,
            initializer_range=0.15,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()


def save_base(directory: Path) -> None:
    build_base().save_pretrained(directory / "base")
    TOKENIZER.save_pretrained(directory / "base")


def save_adapter(
    directory: Path, seed: int = 1, hidden_size: int = 64, **settings: Any
) -> None:
    """Save a random adapter that changes answers much."""
    config, base = (
        LoreftConfig(task_type="CAUSAL_LM", **settings),
        build_base(hidden_size),
    )
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    config.base_model_name_or_path = "base"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "intv_" in name:
                scale = 0.8 if parameter.ndim == 1 else 0.15
                parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(directory)


def save_refused_adapters(directory: Path) -> dict[str, tuple[str, str]]:
    """Save adapters that cannot be served; return by name what the answer to loading
    each says of the reason and of the remedy."""
    settings: dict[str, Any] = {"positions": "f7+l7", "rank": 4}
    for name, more in {
        "rank": {"rank": 16},
        "width": {"hidden_size": 32},
        "component": {"component": "mlp_output"},
        "act_fn": {"act_fn": "relu"},
        "lora_beside": {"lora": {"r": 2, "target_modules": ["q_proj"]}},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "config": {},
        "tensors": {},
    }.items():
        save_adapter(directory / name, **settings | more)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(build_base(), lora).save_pretrained(directory / "method")
    (directory / "config" / "adapter_config.json").write_text('{"peft_type": "LOREFT"')
    weights = directory / "tensors" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return {
        "rank": ("rank 16 is above the server's 8", "--max-lora-rank 16"),
        "width": ("64", "the one it was trained on"),
        "component": ("component: mlp_output", "component: block_output"),
        "act_fn": ("act_fn: relu", "act_fn: null"),
        "lora_beside": ("lora:", "train without it"),
        "modules_to_save": ("modules_to_save:", "train without it"),
        "config": ("no readable adapter", "name a run's output_dir"),
        "tensors": ("missing or damaged", "save the adapter again"),
        "method": ("is LORA", "--lora-target-modules"),
    }


class Answer(NamedTuple):
    """What a server said, by adapter (None: the base)."""

    adapter: str | None
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    text: str


class Reference:
    """The base and its adapters in transformers."""

    def __init__(self, directory: Path, adapters: Sequence[str]) -> None:
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory / "base")
        first, *others = adapters
        self.model = PeftModel.from_pretrained(base, directory / first, first).eval()
        for name in others:
            self.model.load_adapter(directory / name, name)

    @torch.no_grad()
    def generate(self, adapter: str | None, prompt: list[int], count: int) -> list[int]:
        """Return the tokens that ``generate`` answers greedily."""
        inputs = {"input_ids": torch.tensor([prompt]), "max_new_tokens": count}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs |= {"do_sample": False, "pad_token_id": 0}
        if adapter is None:
            with self.model.disable_adapter():
                return self.model.generate(**inputs)[0, len(prompt) :].tolist()
        self.model.set_adapter(adapter)
        return self.model.generate(**inputs)[0, len(prompt) :].tolist()

    @torch.no_grad()
    def difference(
        self, answer: Answer, is_sampled: bool = False, strength: float = 1.0
    ) -> float:
        """Return the largest difference of an answer's logprobs, and of a greedy one's
        from the largest that each token could have."""
        ids = torch.tensor([answer.prompt + answer.tokens])
        labels = ids.clone()
        labels[:, : len(answer.prompt)] = -100
        if answer.adapter is None:
            with self.model.disable_adapter():
                logits = self.model(input_ids=ids).logits
        else:
            self.model.set_adapter(answer.adapter)
            self.model.set_scale(answer.adapter, strength)
            logits = self.model(input_ids=ids, labels=labels).logits
        logprobs_TV = logits[0, len(answer.prompt) - 1 : -1].log_softmax(-1)
        chosen_T = logprobs_TV[range(len(answer.tokens)), answer.tokens]
        found = (chosen_T - torch.tensor(answer.logprobs)).abs().max().item()
        margin = (logprobs_TV.amax(-1) - chosen_T).max().item()
        return found if is_sampled else max(found, margin)


class Server:
    """A server that runs, by its address."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, **body: Any) -> requests.Response:
        return requests.post(f"{self.url}/v1/{path}", json=body, timeout=300)

    def ask(self, adapter: str | None, prompt: Any, **more: Any) -> list[Answer]:
        """Ask for completions of a text or ids, greedily unless ``more`` says else; a
        failure is an ``AssertionError`` with what the server said."""
        body = {"temperature": 0, "max_tokens": 8, "logprobs": 1} | more
        response = self.post(
            "completions",
            model=adapter or "base",
            prompt=prompt,
            return_token_ids=True,
            **body,
        )
        assert response.status_code == 200, response.text
        return [
            Answer(
                adapter,
                choice["prompt_token_ids"],
                choice["token_ids"],
                choice["logprobs"]["token_logprobs"],
                choice["text"],
            )
            for choice in response.json()["choices"]
        ]


def command(directory: Path, adapters: Sequence[str], port: int) -> list[str]:
    """Return the command of a server with two slots for adapters."""
    return [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={directory / 'base'}",
        "--served-model-name=base",
        "--host=127.0.0.1",
        f"--port={port}",
        "--dtype=float32",
        "--enforce-eager",
        "--distributed-executor-backend=uni",
        "--enable-prompt-embeds",
        "--max-model-len=512",
        "--max-num-seqs=8",
        "--block-size=32",
        "--enable-lora",
        "--lora-target-modules=loreft",
        "--max-lora-rank=8",
        "--max-loras=2",
        "--max-cpu-loras=2",
        "--lora-modules",
        *(
            json.dumps({"name": name, "path": str(directory / name)})
            for name in adapters
        ),
    ]


def environment() -> dict[str, str]:
    return os.environ | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Which tests of engines in their own process turn off.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


@contextmanager
def serving(directory: Path, adapters: Sequence[str]) -> Iterator[Server]:
    """Run a server; ``AssertionError`` with the end of its log if it does not start."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    server, log = Server(f"http://127.0.0.1:{port}"), directory / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command(directory, adapters, port),
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        while not _is_up(server):
            assert process.poll() is None, log.read_text()[-4000:]
            time.sleep(0.5)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _is_up(server: Server) -> bool:
    try:
        return requests.get(f"{server.url}/health", timeout=5).status_code == 200
    except requests.ConnectionError:
        return False
