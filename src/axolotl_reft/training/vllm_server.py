"""The client of a ``vllm serve`` that has this package's plugin, for a trainer.

It needs neither vLLM nor one machine: the server reads adapters from a shared folder.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from axolotl_reft.settings.served_rank import max_lora_rank

# The answer of FastAPI where there is no such route.
_NO_ROUTE = '{"detail":"Not Found"}'
_open = build_opener(ProxyHandler({})).open


def serve_command(base: str, rank: Any, *options: str) -> str:
    """Return the shell command that serves a base for adapters of a rank, or of a
    mapping of layers to ranks."""
    largest = max(rank.values()) if isinstance(rank, dict) else rank
    # A server on a GPU refuses CUDA graphs (serving/engine.py).
    command = ["vllm", "serve", base, "--enforce-eager", "--enable-lora"]
    command += [
        "--lora-target-modules",
        "loreft",
        "--max-lora-rank",
        str(max_lora_rank(largest)),
    ]
    return shlex.join([*command, *options])


def training_command(base: str, rank: Any, *options: str) -> str:
    """Return :func:`serve_command` for a server that a trainer generates with."""
    options = ("--logprobs-mode", "processed_logprobs", *options)
    return "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 " + serve_command(base, rank, *options)


class AdapterServer:
    """A vLLM server that holds one adapter of a training, by its HTTP API."""

    def __init__(self, url: str, command: str) -> None:
        self._url = url
        self._command = command
        self._loaded: tuple[str, Path] | None = None

    def wait(self, seconds: float) -> None:
        """Wait until it answers."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.request("models")
                return
            except ConnectionError as error:
                if time.monotonic() >= end:
                    raise
                warnings.warn(f"{error}\nWaiting for it, {seconds:g} s", stacklevel=2)
            time.sleep(min(2.0, seconds))

    def load(self, name: str, folder: Path, adapter: Path) -> None:
        """Load the files in ``adapter``, then unload the one before and delete its
        folder."""
        self.request("load_lora_adapter", lora_name=name, lora_path=str(adapter))
        self.unload()
        self._loaded = name, folder

    def unload(self) -> None:
        """Unload what was loaded, and delete its folder."""
        if self._loaded is not None:
            (name, folder), self._loaded = self._loaded, None
            shutil.rmtree(folder, ignore_errors=True)
            self.request("unload_lora_adapter", lora_name=name)

    def close(self, folder: Path) -> None:
        """Leave nothing behind on the server or in the run's folder."""
        with suppress(OSError, RuntimeError):
            self.unload()
        shutil.rmtree(folder, ignore_errors=True)

    def request(self, path: str, **body: Any) -> bytes:
        """Return the answer, to a POST if there is a body.

        Raises:
            RuntimeError: the server refused.
            ConnectionError: it does not answer.
        """
        data = json.dumps(body).encode() if body else None
        header = {"Content-Type": "application/json"}
        try:
            with _open(Request(f"{self._url}/v1/{path}", data, header)) as answer:
                return answer.read()
        except HTTPError as error:
            said = error.read().decode(errors="replace")[:1000]
            if said == _NO_ROUTE and body:
                said += ", it was started without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            raise RuntimeError(
                f"LoReFT: the vLLM server at {self._url} refused {path}: {error.code} "
                f"{said}\n{self._needs()}"
            ) from error
        except OSError as error:
            raise ConnectionError(
                f"LoReFT: no vLLM server answers at {self._url} ({error})\n"
                f"{self._needs()}"
            ) from error

    def _needs(self) -> str:
        return (
            "Start it in an environment of its own with axolotl-reft[vllm], on a "
            "machine that has the trainer's output_dir at the same path:\n"
            f"{self._command}"
        )

    def check(self, base: str, with_logprobs: bool) -> None:
        """Raise ``ValueError`` if its logprobs are not those that tokens are sampled
        by; warn if its base has another name."""
        models = json.loads(self.request("models"))["data"]
        served = next(model for model in models if model.get("parent") is None)
        if Path(served.get("root") or base).name != Path(base).name:
            warnings.warn(
                f"LoReFT: the vLLM server at {self._url} serves {served['root']!r}, "
                f"and {base!r} is trained: if these are not the same weights, it "
                "generates with another model",
                stacklevel=2,
            )
        # Where one token alone is allowed, its probability is 1.
        for token in (0, 1) if with_logprobs else ():
            answer = self.complete(
                model=served["id"], prompt=[0], max_tokens=1, temperature=1.0,
                logprobs=0, allowed_token_ids=[token],
            )  # fmt: skip
            if abs(answer[0]["logprobs"]["token_logprobs"][0]) > 1e-3:
                raise ValueError(
                    f"LoReFT: the logprobs of the vLLM server at {self._url} leave out "
                    "temperature and the like, so TRL would correct for a difference "
                    "that is none; add --logprobs-mode processed_logprobs:\n"
                    f"{self._command}"
                )

    def complete(self, **body: Any) -> list[dict[str, Any]]:
        """Return the choices of /v1/completions in the order of their prompts."""
        choices = json.loads(self.request("completions", **body))["choices"]
        return sorted(choices, key=lambda choice: choice["index"])
