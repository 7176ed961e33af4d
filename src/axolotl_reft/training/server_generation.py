"""Let TRL's trainers generate with a server that holds the adapter of the step.

TRL's own client for ``use_vllm`` merges an adapter into the base, which LoReFT cannot,
and needs vLLM in the trainer's environment. Here each step's adapter is saved, and
loaded by the server under a new name.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from functools import cache, wraps
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate.utils import broadcast_object_list

from axolotl_reft.training.vllm_server import AdapterServer, training_command

# What TRL's generation_kwargs may add to a request: vLLM ignores keys that it does not
# know, and a seed would give a prompt's answers the same randomness.
_SAMPLING = (
    "allowed_token_ids", "bad_words", "frequency_penalty", "ignore_eos", "logit_bias",
    "min_tokens", "presence_penalty", "stop", "stop_token_ids",
)  # fmt: skip
# By accelerator, of which each trainer has one, the trainer's output_dir.
_OUTPUT_DIRS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def generate_with_server(trainer: Any) -> None:
    """Let one of TRL's trainers, which is being made, generate with a server."""
    _OUTPUT_DIRS[trainer.accelerator] = trainer.args.output_dir
    _replace_generation()


@cache
def _replace_generation() -> None:
    from trl.generation.vllm_generation import VLLMGeneration

    connect = VLLMGeneration._init_vllm

    @wraps(connect)
    def connect_or_replace(self: Any) -> None:
        output_dir = _OUTPUT_DIRS.get(self.accelerator)
        if output_dir is None:
            return connect(self)
        replacement = ServerGeneration(self, output_dir)
        self.sync_weights = replacement.sync_weights
        self.generate = replacement.generate

    # Patch: TRL has no door for another way to generate.
    VLLMGeneration._init_vllm = connect_or_replace  # type: ignore[method-assign]


class ServerGeneration:
    """The two methods that TRL's trainers call of their ``VLLMGeneration``.

    In several processes the first saves and loads, and each sends its own prompts.

    Args:
        settings: the ``VLLMGeneration``: its model, sampling and server.
        output_dir: where adapters are saved for the server.
    """

    def __init__(self, settings: Any, output_dir: str) -> None:
        model = settings.model
        config = model.peft_config[model.active_adapter]
        base = config.base_model_name_or_path or model.name_or_path
        port = str(settings.server_port)
        command = training_command(base, config.rank, "--port", port)
        _check_settings(settings, command)
        self._settings = settings
        url = settings.server_base_url or f"http://{settings.server_host}:{port}"
        self._server = AdapterServer(url, command)
        self._steps = 0
        folder: list[Any] = [None]
        if settings.accelerator.is_main_process:
            self._server.wait(settings.server_timeout)
            self._server.check(base, settings.logprobs is not None)
            folder = [Path(output_dir).absolute() / f"vllm-{uuid4().hex}"]
            weakref.finalize(self, self._server.close, folder[0])
        self._folder: Path = broadcast_object_list(folder)[0]

    @property
    def _name(self) -> str:
        return f"{self._folder.name}-{self._steps}"

    def sync_weights(self) -> None:
        """Let the server generate with the adapter as it is now."""
        self._steps += 1
        accelerator, model = self._settings.accelerator, self._settings.model
        if accelerator.is_main_process:
            adapter, folder = model.active_adapter, self._folder / self._name
            model.save_pretrained(folder, selected_adapters=[adapter])
            # As PEFT names it.
            saved = folder if adapter == "default" else folder / adapter
            self._server.load(self._name, folder, saved)
        accelerator.wait_for_everyone()

    def generate(
        self,
        prompts: list[list[int]],
        images: Any,
        num_generations: int,
        profiler: Any = None,
    ) -> tuple[Any, ...]:
        """Return the prompts, an answer of each, and its tokens' logprobs and ids.

        A prompt is repeated for each of its ``num_generations`` answers.
        """
        if images is not None:
            raise ValueError(
                "LoReFT: use_vllm with images in the prompts is not supported; set "
                "use_vllm: false"
            )
        settings = self._settings
        tokenizer = settings.processing_class
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        # All of them: for those left out the server takes the base's.
        body = {
            "stop_token_ids": [tokenizer.eos_token_id],
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "min_p": settings.min_p or 0.0,
            "repetition_penalty": settings.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            **settings.generation_kwargs,
            "model": self._name,
            "prompt": prompts,
            "max_tokens": settings.max_completion_length,
            "logprobs": settings.logprobs,
            "return_token_ids": True,
        }
        if regex := settings.structured_outputs_regex:
            body["structured_outputs"] = {"regex": regex}
        with profiler or nullcontext():
            choices = self._server.complete(**body)
        answers = [choice["token_ids"] for choice in choices]
        if settings.logprobs is None:
            return prompts, answers, None, None
        logprobs = [choice["logprobs"]["token_logprobs"] for choice in choices]
        return prompts, answers, _each_alone(logprobs), _each_alone(answers)


def _each_alone(rows: list[list[Any]]) -> list[list[list[Any]]]:
    """Return each token's value in a list, as of the one token that was sampled."""
    return [[[value] for value in row] for row in rows]


def _check_settings(settings: Any, command: str) -> None:
    if settings.mode != "server":
        raise ValueError(
            f"LoReFT: use_vllm with vllm_mode: {settings.mode}: TRL builds this engine "
            "without adapters and merges them into the base; set vllm_mode: server, "
            f"and start\n{command}"
        )
    sharded = {"FSDP": settings._dist.is_fsdp, "ZeRO-3": settings._dist.is_zero3}
    for name in (name for name, is_set in sharded.items() if is_set):
        raise ValueError(
            f"LoReFT: use_vllm under {name}: no process has the whole adapter to send "
            "to the server; use DDP or ZeRO-2, or set use_vllm: false"
        )
    if unknown := settings.generation_kwargs.keys() - set(_SAMPLING):
        raise ValueError(
            f"LoReFT: generation_kwargs {', '.join(sorted(unknown))} cannot be used "
            "with use_vllm; remove them (temperature and the like are settings of the "
            f"trainer itself). It takes {', '.join(_SAMPLING)}"
        )
