"""Reads pyreft's directories, as ``ReftModel.save`` or pyreft's trainer wrote them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from axolotl_reft.exchange.directory import CLASSES, PREFIX, SUFFIX
from axolotl_reft.exchange.objects import read_pyreft_state
from axolotl_reft.settings.components import COMPONENTS, from_pyreft_name

# By pyvene's name of the component, or by its path with the dots made underscores.
_KEY = re.compile(
    r"(?:layer_(?P<layer>\d+)_comp_(?P<named>\w+)"
    r"|comp_\w+\[(?P<number>\d+)\]_(?P<path>\w+))_unit_pos_nunit_1#(?P<side>[01])",
    re.ASCII,
)
# Our state dict of each intervention, by layer and side.
States = dict[tuple[int, int], dict[str, Tensor]]


def read_interventions(
    folder: Path, intervention: str | None, component: str | None
) -> tuple[str, str, States]:
    """Return our kind, our component and the states of a directory of pyreft's: kind
    and component as given where it does not tell. ValueError if it is not pyreft's, is
    damaged or unsafe, or does not tell enough."""
    files = {
        file.name.removeprefix(PREFIX).removesuffix(SUFFIX): file
        for file in sorted(folder.glob(f"{PREFIX}*{SUFFIX}"))
    }
    if not files:
        raise ValueError(
            f"DIR: there is no adapter of pyreft's in {str(folder)!r} (no {PREFIX}*"
            f"{SUFFIX}); name what ReftModel.save or pyreft's trainer wrote"
        )
    config = _read_config(folder / "config.json")
    states: States = {}
    kinds, components = set(), set()
    for key, file in files.items():
        written_kind, written_component = config.get(key, (None, None))
        layer, side, edits = _place(file, key, written_component or component)
        state = _load(file)
        kind = intervention or written_kind or _guess(state, file)
        try:
            states[layer, side] = read_pyreft_state(kind, state)
        except ValueError as error:
            raise ValueError(f"DIR: {file.name!r}: {error}") from error
        kinds.add(kind)
        components.add(edits)
    for what, found in (("interventions", kinds), ("components", components)):
        if len(found) > 1:
            raise ValueError(f"DIR: different {what} in one adapter: {sorted(found)}")
    if missing := sorted(config.keys() - files.keys()):
        raise ValueError(f"DIR: the file of {missing[0]!r} is missing")
    return kinds.pop(), components.pop(), states


def _read_config(file: Path) -> dict[str, tuple[str, str]]:
    """Return our kind and pyreft's component of each intervention, by its key.

    Empty without a ``config.json``, as in a checkpoint of pyreft's trainer.
    """
    if not file.is_file():
        return {}
    kinds = {written: name for name, written in CLASSES.items()}
    try:
        settings = json.loads(file.read_text())
        keys, classes = settings["sorted_keys"], settings["intervention_types"]
        if unknown := [written for written in classes if written not in kinds]:
            raise ValueError(f"{unknown[0]!r} is none of its six classes")
        rows = zip(keys, classes, settings["representations"], strict=True)
        return {key: (kinds[written], place[1]) for key, written, place in rows}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"DIR: config.json is not pyreft's ({error})") from error


def _place(file: Path, key: str, component: str | None) -> tuple[int, int, str]:
    """Return layer, side and our component for pyvene's key of an intervention, with
    pyreft's component where it is known."""
    match = _KEY.fullmatch(key)
    if match and match["path"] and not component:
        parts = match["path"].split("_")
        if len(parts) > 2:
            raise ValueError(
                f"component: {file.name!r} has a path whose dots became underscores; "
                "pass it with --component, such as self_attn.o_proj.input"
            )
        component = ".".join(parts) if len(parts) == 2 else f"block_{parts[0]}"
    parsed = match and from_pyreft_name(component or match["named"])
    if not match or not parsed:
        raise ValueError(
            f"DIR: {file.name!r} is not an intervention on a component that can be "
            f"imported: {', '.join(COMPONENTS)}, or a module's input or output"
        )
    return int(match["layer"] or match["number"]), int(match["side"]), parsed[1]


def _load(file: Path) -> dict[str, Tensor]:
    try:
        state = dict(torch.load(file, map_location="cpu", weights_only=True))
        if not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise TypeError("not a tensor")
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(
            f"DIR: {file.name!r} is damaged, or holds something other than tensors"
        ) from error
    return state


def _guess(state: dict[str, Tensor], file: Path) -> str:
    """Return the kind that the keys tell: the trainer's checkpoints do not name it."""
    if "rotate_layer" in state:
        return "loreft"
    projected = "proj_layer.weight" in state
    if "learned_source.weight" in state and not projected:
        return "orthogonal_direft"
    either = "noreft or direft" if projected else "consreft or lobireft"
    raise ValueError(
        f"DIR: {file.name!r} may be {either}, and does not say; pass --intervention"
    )
