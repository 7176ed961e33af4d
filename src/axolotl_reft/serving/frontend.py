"""A server's front end: adapters are read, checked and numbered before a request goes
to the engine, where an error would end all others too."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from axolotl_reft.serving.adapters import AdapterStore, ServedAdapter
from axolotl_reft.serving.engine import TARGET, served_base, serves_loreft

_logger = logging.getLogger("vllm.axolotl_reft")


class RefusedRequest(VLLMClientError, ValueError):
    """A request that is refused with status 400; vLLM answers other errors of a
    request with 500, and without their message."""


class FrontEnd:
    """The adapters that requests of a process may name."""

    def __init__(self, vllm_config: Any) -> None:
        self._base = served_base(vllm_config)
        self._serves = serves_loreft(vllm_config)
        targets = vllm_config.lora_config.target_modules
        self._has_lora = targets is None or set(targets) != {TARGET}
        self._store = AdapterStore(self._base)
        self._directories: dict[str, str] = {}
        self._first_numbers: dict[str, int] = {}

    def serve(self, lora_request: LoRARequest, is_load: bool = False) -> LoRARequest:
        """Return the request by which the engine knows an adapter: a LoReFT adapter by
        its number, LoRA as it is. ``ValueError`` for what cannot be served.

        A repository on the hub is fetched anew where ``is_load``, and else once.
        """
        path, name = lora_request.lora_path, lora_request.lora_name
        directory = None if is_load else self._directories.get(path)
        if directory is None:
            directory = get_adapter_absolute_path(path)
        if Path(directory).is_dir():
            self._directories[path] = directory
        if not self._is_loreft(directory, name):
            return lora_request
        adapter = self._store.get(directory, name)
        number = adapter.number
        if name not in self._first_numbers:
            self._first_numbers[name] = number
            self._warn_of_another_base(adapter, name)
        if self._first_numbers[name] != number:
            # vLLM tells adapters of a step apart by their names.
            name = f"{name}@{adapter.digest.hex()[:8]}"
        return LoRARequest(
            name,
            number,
            adapter.directory,
            base_model_name=lora_request.base_model_name,
        )

    def _is_loreft(self, directory: str, name: str) -> bool:
        method = _method(directory)
        if method == "LOREFT" and not self._serves:
            raise ValueError(
                f"adapter {name!r} is LoReFT, which this engine was not started for; "
                f"add --lora-target-modules {TARGET} (lora_target_modules=['{TARGET}'])"
            )
        # An unreadable configuration is read again, for the reason.
        if self._has_lora or method in (None, "", "LOREFT"):
            return method == "LOREFT" or (self._serves and method == "")
        raise ValueError(
            f"adapter {name!r} is {method}, and {TARGET} is the only target of this "
            f"engine, so it would not be applied; name the modules that it changes "
            f"beside {TARGET} in --lora-target-modules"
        )

    def _warn_of_another_base(self, adapter: ServedAdapter, name: str) -> None:
        trained_on = adapter.config.base_model_name_or_path or ""
        served = self._base.name
        if Path(trained_on).name != Path(served).name:
            _logger.warning(
                "LoReFT adapter %r was trained on %r, and %r is served: if these are "
                "not the same weights, answers are wrong",
                name,
                trained_on,
                served,
            )


def serve(
    input_processor: Any, lora_request: LoRARequest, is_load: bool = False
) -> LoRARequest:
    """:meth:`FrontEnd.serve` of vLLM's input processor; without LoRA, which vLLM then
    refuses, the request as it is."""
    if input_processor.vllm_config.lora_config is None:
        return lora_request
    if not hasattr(input_processor, "loreft"):
        input_processor.loreft = FrontEnd(input_processor.vllm_config)
    return input_processor.loreft.serve(lora_request, is_load)


def _method(directory: str) -> str | None:
    """Return the PEFT method of an adapter; "" if its configuration cannot be read,
    None if there is none."""
    try:
        settings = json.loads((Path(directory) / CONFIG_NAME).read_text())
        return settings.get("peft_type", "")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError):
        return ""
