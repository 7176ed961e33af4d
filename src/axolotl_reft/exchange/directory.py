"""Adapters as pyreft's directories: how they are written, and ``axolotl reft export``.

pyreft writes ``config.json`` and a pickle of tensors per intervention, prefixes first
and then suffixes where they are untied. It does not write positions, tying, dropout or
activation: for those our ``adapter_config.json`` is put beside, which pyreft ignores.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from axolotl_reft.core.interventions import INTERVENTION_CLASSES, Intervention
from axolotl_reft.core.kinds import KINDS
from axolotl_reft.core.tensors import check_tensors
from axolotl_reft.exchange.objects import import_pyreft, make_pyreft_object
from axolotl_reft.saved.directory import read_adapter_config, read_tensors
from axolotl_reft.settings.components import to_pyreft_name
from axolotl_reft.tuner.config import LoreftConfig

PREFIX, SUFFIX = "intkey_", ".bin"
# How config.json names the class of a kind.
CLASSES = {
    name: f"<class 'pyreft.interventions.{kind.pyreft_class}'>"
    for name, kind in KINDS.items()
}


def export_adapter(directory: str, out: str) -> str | None:
    """Write a saved LoReFT adapter as a directory of pyreft's.

    Returns:
        The component, if it has no name, which pyreft 0.1.0 cannot load.

    Raises:
        ValueError: pyreft is missing, there is no such adapter, pyreft has no place for
            something in it, or ``out`` is in use. Nothing is written then.
    """
    import_pyreft()
    config = read_adapter_config(directory, "DIR")
    refuse_lora(config, "DIR: the adapter")
    saved = read_tensors(directory, "DIR")
    if saved.others:
        raise ValueError(
            f"DIR: pyreft's format has no place for {min(saved.others)!r}; export an "
            "adapter without modules_to_save"
        )
    kind = KINDS[config.intervention]
    interventions = {}
    for (layer, side), state in saved.interventions.items():
        width, rank = kind.sizes(state)
        check_tensors(state, kind.expected_shapes(width, rank), f"DIR, layer {layer}")
        ours = INTERVENTION_CLASSES[kind.name](embed_dim=width, low_rank_dimension=rank)
        ours.load_state_dict(state)
        interventions[side, layer] = ours
    with new_directory(out) as folder:
        write_directory(config, saved.layers, interventions, folder)
    component = to_pyreft_name(config.component, saved.layers, 0)
    return component if "." in component else None


def refuse_lora(config: LoreftConfig, adapter: str) -> None:
    """Raise ValueError for an adapter with LoRA beside LoReFT."""
    if config.lora is not None:
        raise ValueError(
            f"{adapter} has LoRA beside LoReFT (lora: {config.lora}), for which pyreft "
            "has no place; train one without lora"
        )


def write_directory(
    config: LoreftConfig,
    layers: str,
    interventions: Mapping[tuple[int, int], Intervention],
    folder: Path,
) -> None:
    """Write interventions as pyreft does, and our configuration beside them.

    Args:
        layers: path of the model's list of layers.
        interventions: by side and layer.
    """
    keys, sizes, representations = [], [], []
    for (side, layer), ours in sorted(interventions.items()):
        component = to_pyreft_name(config.component, layers, layer)
        place = f"layer_{layer}_comp_{component}"
        if "." in component:
            place = f"comp_{component.replace('.', '_')}"
        key = f"{place}_unit_pos_nunit_1#{side}"
        keys.append(key)
        sizes.append(ours.hidden_size)
        # pyvene's RepresentationConfig: layer, component, unit, units, rank, nulls
        representations.append([layer, component, "pos", 1, ours.rank, *[None] * 9])
        theirs = make_pyreft_object(
            config.intervention, ours, config.act_fn, config.dropout
        )
        torch.save(theirs.state_dict(), folder / f"{PREFIX}{key}{SUFFIX}")
    settings = {
        "intervention_constant_sources": [True] * len(keys),
        "intervention_dimensions": sizes,
        "intervention_types": [CLASSES[config.intervention]] * len(keys),
        "mode": "parallel",
        "representations": representations,
        "sorted_keys": keys,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    config.save_pretrained(folder)


@contextmanager
def new_directory(out: str) -> Iterator[Path]:
    """Yield a folder that becomes ``out`` at the end, and vanishes after an error;
    ValueError if ``out`` is in use."""
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"OUT: {out!r} exists and is not empty; name a new directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(target)  # also over an empty directory
    finally:
        shutil.rmtree(folder, ignore_errors=True)
