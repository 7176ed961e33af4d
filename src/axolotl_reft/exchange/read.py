"""Reads pyreft's directories, as ``ReftModel.save`` or pyreft's trainer wrote them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, TaskType
from torch import Tensor

from axolotl_reft.core.kinds import KINDS
from axolotl_reft.exchange.objects import read_as_noreft, read_pyreft_state
from axolotl_reft.exchange.write import CLASSES, PREFIX, SUFFIX
from axolotl_reft.prompts.positions import Positions
from axolotl_reft.saved.directory import read_adapter_config
from axolotl_reft.settings.components import COMPONENTS, from_pyreft_name
from axolotl_reft.tuner.config import LoreftConfig

# By pyvene's name of the component, or by its path with the dots made underscores.
_KEY = re.compile(
    r"(?:layer_(?P<layer>\d+)_comp_(?P<named>\w+)"
    r"|comp_(?P<path>\w+\[(?P<number>\d+)\]\w+))_unit_pos_nunit_1#(?P<side>[01])",
    re.ASCII,
)
_TRAINER_FOLDER = "intervenable_model"
_KINDS = {written: name for name, written in CLASSES.items()}


@dataclass
class PyreftAdapter:
    """A directory of pyreft's, read and checked.

    Attributes:
        intervention: our name of its kind.
        component: ours.
        interventions: our state dict of each, by layer and side.
        exported: the configuration that an export left in it.
    """

    intervention: str
    component: str
    interventions: dict[tuple[int, int], dict[str, Tensor]]
    exported: LoreftConfig | None

    def config(
        self, positions: str | None, dropout: float | None, act_fn: str | None
    ) -> LoreftConfig:
        """Return its configuration, from what was passed, exported, or inferred.

        Raises:
            ValueError: positions are missing, or do not suit the interventions.
        """
        exported = self.exported
        if exported is not None:
            positions = positions or exported.positions
            dropout = exported.dropout if dropout is None else dropout
            act_fn = exported.act_fn if act_fn is None else act_fn
        if positions is None:
            raise ValueError(
                "positions: pyreft does not save which positions an adapter was "
                "trained on; pass --positions, for example --positions f7+l7"
            )
        layers: list[int | str] = sorted({layer for layer, _ in self.interventions})
        sides = sorted({side for _, side in self.interventions})
        if 1 in sides and not Positions.parse(positions).two_sided:
            raise ValueError(
                f"positions: {positions} has one side, but there are two interventions "
                "a layer; pass --positions f<n>+l<m>"
            )
        if 0 not in sides or len(self.interventions) < len(layers) * len(sides):
            raise ValueError(
                "DIR: some layers have an intervention for prefix and suffix and some "
                "for one of them; an adapter has the same for all"
            )
        return LoreftConfig(
            task_type=TaskType.CAUSAL_LM,
            layers=layers,
            positions=positions,
            rank=self._rank(),
            tied_weights=len(sides) == 1,
            intervention=self.intervention,
            component=self.component,
            dropout=dropout or 0.0,
            act_fn=act_fn,
        )

    def _rank(self) -> int | dict[str | int, int]:
        """One for all, or one a layer."""
        ranks: dict[str | int, int] = {}
        for (layer, _), state in sorted(self.interventions.items()):
            _, rank = KINDS[self.intervention].sizes(state)
            if ranks.setdefault(str(layer), rank) != rank:
                raise ValueError(
                    f"DIR: prefix and suffix of layer {layer} have different ranks, "
                    "which cannot be imported; a layer has one rank"
                )
        distinct = set(ranks.values())
        return distinct.pop() if len(distinct) == 1 else ranks


def read_directory(
    directory: Path, intervention: str | None, component: str | None
) -> PyreftAdapter:
    """Read a directory of pyreft's.

    Args:
        intervention: our name of the kind, where the directory does not tell.
        component: likewise.

    Raises:
        ValueError: it is not pyreft's, is damaged or unsafe, or something that it does
            not tell is missing.
    """
    folder = directory / _TRAINER_FOLDER
    folder = folder if folder.is_dir() else directory
    files = {
        file.name.removeprefix(PREFIX).removesuffix(SUFFIX): file
        for file in sorted(folder.glob(f"{PREFIX}*{SUFFIX}"))
    }
    if not files:
        raise ValueError(
            f"DIR: there is no adapter of pyreft's in {str(directory)!r} (looked for "
            f"{PREFIX}*{SUFFIX}); name the directory that ReftModel.save wrote, or a "
            "checkpoint of pyreft's trainer"
        )
    kinds, components = _read_config(folder)
    interventions = {}
    found, edited = set(), set()
    for key, file in files.items():
        layer, side, edits = _place(file, key, components.get(key) or component)
        state = _load(file)
        kind = intervention or kinds.get(key) or _guess(state, file)
        try:
            if kind == "noreft" and "rotate_layer" in state:
                interventions[layer, side] = read_as_noreft(state)
            else:
                interventions[layer, side] = read_pyreft_state(kind, state)
        except ValueError as error:
            raise ValueError(f"DIR: {file.name!r}: {error}") from error
        found.add(kind)
        edited.add(edits)
    for what, several in (("interventions", found), ("components", edited)):
        if len(several) > 1:
            raise ValueError(f"DIR: different {what} in one adapter: {sorted(several)}")
    if missing := sorted(kinds.keys() - files.keys()):
        raise ValueError(f"DIR: the file of {missing[0]!r} is missing")
    exported = (folder / CONFIG_NAME).is_file()
    return PyreftAdapter(
        intervention=found.pop(),
        component=edited.pop(),
        interventions=interventions,
        exported=read_adapter_config(str(folder), "DIR") if exported else None,
    )


def _place(file: Path, key: str, component: str | None) -> tuple[int, int, str]:
    """Return layer, side and our component for pyvene's key of an intervention."""
    match = _KEY.fullmatch(key)
    parsed = match and from_pyreft_name(
        component or match["named"] or _path(match["path"], file)
    )
    if not match or not parsed:
        raise ValueError(
            f"DIR: {file.name!r} is not an intervention on a component that can be "
            f"imported: {', '.join(COMPONENTS)}, or a module's input or output"
        )
    return int(match["layer"] or match["number"]), int(match["side"]), parsed[1]


def _path(written: str, file: Path) -> str:
    """``model_layers[1]_mlp_output`` as a path, if it can only be one."""
    parts = written.partition("]_")[2].split("_")
    if len(parts) > 2:
        raise ValueError(
            f"component: {file.name!r} has a path whose dots became underscores; pass "
            "it with --component, for example --component self_attn.o_proj.input"
        )
    return ".".join(parts) if len(parts) == 2 else f"block_{parts[0]}"


def _read_config(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Our kind of each intervention and pyreft's component of it, by its key.

    Both are empty without a ``config.json``, as in a checkpoint of pyreft's trainer.
    """
    file = folder / "config.json"
    if not file.is_file():
        return {}, {}
    try:
        settings = json.loads(file.read_text())
        keys = settings["sorted_keys"]
        classes = dict(zip(keys, settings["intervention_types"], strict=True))
        places = [str(place[1]) for place in settings["representations"]]
        components = dict(zip(keys, places, strict=True))
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"DIR: config.json is not one of pyreft's ({error})"
        ) from error
    if unknown := [written for written in classes.values() if written not in _KINDS]:
        raise ValueError(
            f"DIR: config.json has the class {unknown[0]!r}, which is none of pyreft's "
            "six"
        )
    return {key: _KINDS[written] for key, written in classes.items()}, components


def _load(file: Path) -> dict[str, Tensor]:
    try:
        state = dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(
            f"DIR: {file.name!r} is damaged, or holds something other than tensors, "
            "and is not read"
        ) from error
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"DIR: {file.name!r}: {name!r} is not a tensor")
    return state


def _guess(state: dict[str, Tensor], file: Path) -> str:
    """The kind by its keys, for the trainer's checkpoints, which do not name it."""
    if "rotate_layer" in state:
        return "loreft"
    if "learned_source.weight" in state and "proj_layer.weight" not in state:
        return "orthogonal_direft"
    projected = "proj_layer.weight" in state
    either = "noreft or direft" if projected else "consreft or lobireft"
    raise ValueError(
        f"DIR: {file.name!r} may be {either}, and a checkpoint of pyreft's trainer "
        "does not say; pass --intervention"
    )
