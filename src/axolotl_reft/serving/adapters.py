"""Adapters that a server holds: read and checked before use, and known by content.

An adapter's number is made from its files, so no cached token and no loaded parameter
can outlive a change of them, whatever the adapter is called. Needs no vLLM.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from axolotl_reft.core.affine import AffineStack, affine_stack
from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.saved.directory import (
    check_adapter_fits,
    read_adapter_config,
    read_tensors,
)
from axolotl_reft.settings.served_rank import max_lora_rank
from axolotl_reft.settings.spec import AdapterSpec
from axolotl_reft.tuner.config import LoreftConfig

# Numbers from here on are made from an adapter's files; LoRA's are counted from 1.
_FIRST_NUMBER = 1 << 62
_SETTING = "LoReFT adapter"
_UNUSED_SECONDS = 3600


def is_loreft_number(number: int) -> bool:
    """Return whether the number of an adapter is one of :class:`ServedAdapter`."""
    return number >= _FIRST_NUMBER


@dataclass(frozen=True)
class ServedAdapter:
    """One state of an adapter's files.

    Attributes:
        digest: SHA-256 of the configuration and the tensors.
        config: the configuration, of which ``spec`` is the parsed form.
    """

    directory: str
    digest: bytes
    config: LoreftConfig
    spec: AdapterSpec

    @property
    def number(self) -> int:
        """The adapter's number, from 2⁶² to 2⁶³ − 1."""
        return _number(self.digest)


@dataclass(frozen=True)
class ServedBase:
    """A base model as far as an adapter must fit it; ``name`` is its path or its
    repository."""

    name: str
    hidden_size: int
    layers: int
    max_rank: int

    def read(self, directory: str, name: str) -> ServedAdapter:
        """Read and check the adapter called ``name``; ``ValueError`` if it is damaged,
        of another base, or needs more than edits of the residual stream."""
        setting = f"LoReFT adapter {name!r}"
        digest = _digest(directory, setting)
        config = check_adapter_fits(directory, setting, self.hidden_size, self.layers)
        spec = config.spec()
        reason = self._reason_against(directory, config, spec)
        if reason:
            raise ValueError(f"{setting} cannot be served: {reason}")
        if digest != _digest(directory, setting):
            raise ValueError(
                f"{setting}: the files in {directory!r} changed while they were read; "
                "load it again when they are complete"
            )
        return ServedAdapter(directory, digest, config, spec)

    def _reason_against(
        self, directory: str, config: LoreftConfig, spec: AdapterSpec
    ) -> str | None:
        if spec.component != "block_output":
            return (
                f"component: {spec.component} is edited within a layer, and a server "
                "edits layers' outputs; train with component: block_output, or use "
                "generate of transformers"
            )
        if spec.act_fn not in (None, "linear"):
            return (
                f"act_fn: {spec.act_fn} makes the edit other than linear; train with "
                "act_fn: null, or use generate of transformers"
            )
        for setting in ("lora", "modules_to_save"):
            if value := getattr(config, setting):
                return (
                    f"{setting}: {value} is not LoReFT, and would be left out; train "
                    "without it, or use generate of transformers"
                )
        if others := read_tensors(directory, _SETTING).others:
            return (
                f"its weights hold {min(others)!r} beside LoReFT, which would be left "
                "out; train on a base that has it, or use generate of transformers"
            )
        rank = max(spec.ranks(self.layers).values())
        if rank > self.max_rank:
            return (
                f"its rank {rank} is above the server's {self.max_rank}; start the "
                f"server with --max-lora-rank {max_lora_rank(rank)}"
            )
        return None


class AdapterStore:
    """The adapters of a process, by directory, read anew when their files change.

    The engine gets a copy of each state of the files. A request may wait for its
    adapter, or need it again, when the files have changed: an error of loading it then
    would end the engine. Copies that no request has used for an hour are deleted.
    """

    def __init__(self, base: ServedBase) -> None:
        self._base = base
        self._copies = TemporaryDirectory(prefix="axolotl-reft-")
        self._kept: dict[str, tuple[tuple[int, ...], ServedAdapter]] = {}
        self._last_uses: dict[str, float] = {}  # of the copies

    def get(self, directory: str, name: str) -> ServedAdapter:
        """Return the adapter as its files are now (:meth:`ServedBase.read`)."""
        # Before reading: files that change meanwhile are read once more.
        state = _file_state(directory)
        kept = self._kept.get(directory)
        if kept is None or kept[0] != state:
            self._delete_unused()
            adapter = self._base.read(directory, name)
            kept = self._kept[directory] = state, self._copy(adapter, name)
        self._last_uses[kept[1].directory] = time.monotonic()
        return kept[1]

    def _delete_unused(self) -> None:
        oldest = time.monotonic() - _UNUSED_SECONDS
        unused = {copy for copy, used in self._last_uses.items() if used < oldest}
        for copy in unused:
            shutil.rmtree(copy)
            del self._last_uses[copy]
        for directory, (_, adapter) in list(self._kept.items()):
            if adapter.directory in unused:
                del self._kept[directory]

    def _copy(self, adapter: ServedAdapter, name: str) -> ServedAdapter:
        copy = Path(self._copies.name, adapter.digest.hex())
        if not copy.exists():
            unchecked = Path(self._copies.name, "unchecked")
            unchecked.mkdir(exist_ok=True)
            try:
                for path in _files(adapter.directory):
                    shutil.copy(path, unchecked)
                is_same = _digest(str(unchecked), _SETTING) == adapter.digest
            except OSError:
                is_same = False
            if not is_same:
                raise ValueError(
                    f"LoReFT adapter {name!r}: the files in {adapter.directory!r} "
                    "changed while they were read; load it again when they are complete"
                )
            unchecked.rename(copy)
        return replace(adapter, directory=str(copy))


@lru_cache(maxsize=4096)
def load_spec(directory: str, number: int) -> AdapterSpec:
    """Return the settings of an adapter that the front end has checked; ``ValueError``
    if its files are no longer those that its number was made from."""
    config = read_adapter_config(directory, _SETTING)
    _check_number(directory, number)
    return config.spec()


def load_edits(directory: str, number: int) -> dict[int, AffineStack]:
    """Return each edited layer's M, b and P, of one side or two, by layer; errors as
    of :func:`load_spec`."""
    kind, tensors = load_spec(directory, number).kind, read_tensors(directory, _SETTING)
    _check_number(directory, number)
    layers: dict[int, list[torch.nn.Module]] = {}
    for (layer, _), state in sorted(tensors.interventions.items()):
        width, rank = kind.sizes(state)
        with torch.device("meta"):
            intervention = INTERVENTION_CLASSES[kind.name](
                embed_dim=width, low_rank_dimension=rank
            )
        intervention.load_state_dict(state, assign=True)
        layers.setdefault(layer, []).append(intervention)
    with torch.no_grad():
        return _in_a_block(
            {layer: affine_stack(sides) for layer, sides in layers.items()}
        )


def _in_a_block(stacks: dict[int, AffineStack]) -> dict[int, AffineStack]:
    """Return the stacks in one block of memory: as small tensors among those that they
    are made of, they would keep the allocator from giving back nearly as much again."""
    given = [t for stack in stacks.values() for t in stack if t is not None]
    block = torch.cat([tensor.flatten() for tensor in given])
    parts = iter(block.split([tensor.numel() for tensor in given]))
    return {
        layer: AffineStack._make(
            None if t is None else next(parts).view(t.shape) for t in stack
        )
        for layer, stack in stacks.items()
    }


def _check_number(directory: str, number: int) -> None:
    if _number(_digest(directory, _SETTING)) != number:
        raise ValueError(
            f"LoReFT: the files in {directory!r} changed after a request for them was "
            "accepted; send it again, and save another adapter in another directory"
        )


def _number(digest: bytes) -> int:
    return _FIRST_NUMBER | (int.from_bytes(digest[:8], "big") >> 2)


def _files(directory: str) -> list[Path]:
    return [Path(directory) / CONFIG_NAME, Path(directory) / SAFETENSORS_WEIGHTS_NAME]


def _file_state(directory: str) -> tuple[int, ...]:
    """Return numbers that change with the files."""
    state: list[int] = []
    for path in _files(directory):
        try:
            found = path.stat()
        except OSError:
            continue  # reading them says why
        state += (found.st_mtime_ns, found.st_size, found.st_ino)
    return tuple(state)


def _digest(directory: str, setting: str) -> bytes:
    digest = hashlib.sha256()
    for path in _files(directory):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(
                f"{setting}: {str(path)!r} cannot be read ({error.strerror}); name a "
                "run's output_dir or a checkpoint-N below it"
            ) from error
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.digest()
