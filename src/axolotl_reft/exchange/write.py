"""Writes adapters as pyreft's directories.

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
from typing import Any

import torch

from axolotl_reft.core.kinds import KINDS
from axolotl_reft.exchange.objects import make_pyreft_object
from axolotl_reft.settings.components import to_pyreft_name
from axolotl_reft.tuner.config import LoreftConfig

PREFIX, SUFFIX = "intkey_", ".bin"
# As config.json names an intervention's class, by our name of the kind.
CLASSES = {
    name: f"<class 'pyreft.interventions.{kind.pyreft_class}'>"
    for name, kind in KINDS.items()
}


def refuse_lora(config: LoreftConfig, adapter: str) -> None:
    """Raise ValueError for an adapter with LoRA beside LoReFT."""
    if config.lora is not None:
        raise ValueError(
            f"{adapter} has LoRA beside LoReFT (lora: {config.lora}), for which pyreft "
            "has no place; train one without lora for pyreft"
        )


def write_directory(
    config: LoreftConfig,
    layers: str,
    interventions: Mapping[tuple[int, int], Any],
    folder: Path,
) -> None:
    """Write interventions as pyreft does, and our configuration beside them.

    Args:
        layers: path of the model's list of layers.
        interventions: ours, by side and layer.
    """
    keys, sizes, representations = [], [], []
    for (side, layer), ours in sorted(interventions.items()):
        theirs = make_pyreft_object(
            config.intervention, ours, config.act_fn, config.dropout
        )
        component = to_pyreft_name(config.component, layers, layer)
        keys.append(_pyvene_key(component, layer, side))
        sizes.append(ours.hidden_size)
        # pyvene's RepresentationConfig: layer, component, unit, units, rank, nulls
        representations.append([layer, component, "pos", 1, ours.rank, *[None] * 9])
        torch.save(theirs.state_dict(), folder / f"{PREFIX}{keys[-1]}{SUFFIX}")
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
    """Yield a folder that becomes ``out`` at the end, and vanishes after an error.

    Raises:
        ValueError: ``out`` is in use.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"OUT: {out!r} exists and is not empty; name a new directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield folder
        folder.chmod(0o755)
        if target.exists():
            target.rmdir()
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pyvene_key(component: str, layer: int, side: int) -> str:
    if "." in component:
        place = f"comp_{component.replace('.', '_')}"
    else:
        place = f"layer_{layer}_comp_{component}"
    return f"{place}_unit_pos_nunit_1#{side}"
