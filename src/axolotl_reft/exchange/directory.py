"""Adapters to and from pyreft: its directories, and its live models.

What pyreft writes: ``config.json`` and a pickle of tensors per intervention, prefixes
first and then suffixes where they are untied. It does not write positions, tying,
dropout or activation; an exported directory carries our ``adapter_config.json`` for
those, which pyreft does not look at.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyreft
import torch
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, TaskType
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.errors import shown
from axolotl_reft.exchange.objects import (
    make_pyreft_object,
    pyreft_class,
    read_as_noreft,
    read_pyreft_state,
)
from axolotl_reft.prompts.positions import Positions
from axolotl_reft.saved.directory import read_adapter_config
from axolotl_reft.settings.components import (
    COMPONENTS,
    from_pyreft_name,
    to_pyreft_name,
)
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.layer import LoreftDecoderLayer
from axolotl_reft.tuner.model import find_decoder_layers

_OURS = re.compile(
    r"base_model\.model\.(?P<list>.+)\.(?P<layer>\d+)"
    r"\.intv_(?P<side>[01])\.(?P<name>\w+)"
)
# By pyvene's name of the component, or by its path with the dots made underscores.
_THEIRS = re.compile(
    r"(?:layer_(?P<layer>\d+)_comp_(?P<named>\w+)"
    r"|comp_(?P<path>\w+\[(?P<number>\d+)\]\w+))_unit_pos_nunit_1#(?P<side>[01])",
    re.ASCII,
)
_PREFIX, _SUFFIX = "intkey_", ".bin"
_TRAINER_FOLDER = "intervenable_model"
_CLASSES = {str(pyreft_class(name)): name for name in INTERVENTION_CLASSES}

Numbers = dict[tuple[int, int], dict[str, Tensor]]


# --- live models ---------------------------------------------------------------------


def to_pyreft(peft_model: PeftModel) -> pyreft.ReftModel:
    """A ``pyreft.ReftModel`` that computes what ``peft_model`` does.

    Its interventions are the adapter's own objects, and its base model's weights those
    of the adapter's base: training or changing either changes both. Its modules are
    copies, because pyvene removes every hook of a model that it runs. As always with
    pyreft, the positions are the caller's to pass, as ``unit_locations``. What its
    ``save`` writes is what :func:`export_adapter` does.

    Raises:
        ValueError: the active adapter is not LoReFT, or there are several.
    """
    active = peft_model.base_model.active_adapters
    if len(active) > 1:
        raise ValueError(
            f"the adapters {', '.join(active)} are active together, and one can be "
            "handed to pyreft; choose it with model.set_adapter"
        )
    name = peft_model.active_adapter
    config = peft_model.peft_config[name]
    if not isinstance(config, LoreftConfig):
        raise ValueError(f"the active adapter {name!r} is not a LoReFT adapter")
    _refuse_lora(config, f"the active adapter {name!r}")
    tensors = [*peft_model.parameters(), *peft_model.buffers()]
    shared = {id(tensor): tensor for tensor in tensors}
    base = copy.deepcopy(peft_model, shared).unload()
    path, _ = find_decoder_layers(base)
    interventions = _live_interventions(peft_model, name)
    representations = [
        {
            "layer": layer,
            "component": to_pyreft_name(config.component, path, layer),
            "low_rank_dimension": intervention.rank,
            "intervention": intervention,
        }
        for (_, layer), intervention in interventions.items()
    ]
    model = _LiveReftModel(pyreft.ReftConfig(representations=representations), base)
    model.write = partial(_write, config, path, interventions)
    model.disable_model_gradients()
    model.set_device(peft_model.device)
    model.train(peft_model.training)
    return model


class _LiveReftModel(pyreft.ReftModel):
    """pyreft's model over our interventions, saved as pyreft saves its own."""

    write: Callable[[Path], None]

    def save(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            raise ValueError(
                "save: only a directory can be saved to here; write it, and upload it "
                "with huggingface_hub's upload_folder"
            )
        with _new_directory(save_directory) as folder:
            self.write(folder)

    def save_intervention(self, save_directory: str, **kwargs: Any) -> None:
        """As pyreft's trainer does at every checkpoint."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.write(Path(save_directory))


def _live_interventions(
    peft_model: PeftModel, adapter: str
) -> dict[tuple[int, int], nn.Module]:
    """By side and layer, in pyreft's order: all of one side, then the other."""
    layers = [
        (int(path.rpartition(".")[2]), module)
        for path, module in peft_model.named_modules()
        if isinstance(module, LoreftDecoderLayer) and adapter in module.intv_0
    ]
    return {
        (side, number): getattr(layer, container)[adapter]
        for side, container in enumerate(("intv_0", "intv_1"))
        for number, layer in layers
        if adapter in getattr(layer, container)
    }


def from_pyreft(
    directory: str | os.PathLike[str],
    base_model: PreTrainedModel,
    *,
    positions: str | None = None,
    intervention: str | None = None,
    component: str | None = None,
    dropout: float | None = None,
    act_fn: str | None = None,
) -> PeftModel:
    """The adapter that pyreft saved in ``directory``, on ``base_model``.

    Args:
        directory: of ``ReftModel.save``, or a checkpoint of pyreft's trainer.
        positions: what was trained with; needed unless the directory is one that
            :func:`export_adapter` wrote. Prefix and suffix were untied if there are two
            interventions a layer.
        intervention: needed where a checkpoint does not tell; ``noreft`` reads a LoReFT
            whose rotation is not orthonormal any more.
        component: needed where a checkpoint does not tell: a path within the layer,
            whose dots pyreft wrote as underscores.
        dropout: what was trained with; pyreft does not save it.
        act_fn: likewise.

    Raises:
        ValueError: the directory is not pyreft's, is damaged or unsafe, or something
            that it does not tell is missing.
    """
    saved = _read_directory(Path(directory), intervention, component)
    config = _settings(saved, positions, dropout, act_fn)
    model = get_peft_model(base_model, config)
    _fill(model, saved)
    return model


def _refuse_lora(config: LoreftConfig, adapter: str) -> None:
    if config.lora is not None:
        raise ValueError(
            f"{adapter} has LoRA beside LoReFT (lora: {config.lora}), for which pyreft "
            "has no place; train one without lora for pyreft"
        )


# --- directories ---------------------------------------------------------------------


def export_adapter(directory: str, out: str) -> str | None:
    """Write a saved LoReFT adapter as a directory of pyreft's.

    Returns:
        The component, if it has no name, which pyreft 0.1.0 cannot load.

    Raises:
        ValueError: there is no such adapter, pyreft has no place for something in it,
            or ``out`` is in use. Nothing is written then.
    """
    config = read_adapter_config(directory, "DIR")
    _refuse_lora(config, "DIR: the adapter")
    layers, numbers = _read_adapter(Path(directory) / SAFETENSORS_WEIGHTS_NAME)
    interventions: dict[tuple[int, int], nn.Module] = {}
    for (layer, side), state in numbers.items():
        rank, size = _shape(state)
        ours = INTERVENTION_CLASSES[config.intervention](
            embed_dim=size, low_rank_dimension=rank
        )
        ours.load_state_dict(state)
        interventions[side, layer] = ours
    with _new_directory(out) as folder:
        _write(config, layers, interventions, folder)
    component = to_pyreft_name(config.component, layers, 0)
    return component if "." in component else None


def _write(
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
    kind = str(pyreft_class(config.intervention))
    keys, sizes, representations = [], [], []
    for (side, layer), ours in sorted(interventions.items()):
        theirs = make_pyreft_object(
            config.intervention, ours, config.act_fn, config.dropout
        )
        component = to_pyreft_name(config.component, layers, layer)
        keys.append(_key(component, layer, side))
        sizes.append(ours.hidden_size)
        # pyvene's RepresentationConfig: layer, component, unit, units, rank, nulls
        representations.append([layer, component, "pos", 1, ours.rank, *[None] * 9])
        torch.save(theirs.state_dict(), folder / f"{_PREFIX}{keys[-1]}{_SUFFIX}")
    settings = {
        "intervention_constant_sources": [True] * len(keys),
        "intervention_dimensions": sizes,
        "intervention_types": [kind] * len(keys),
        "mode": "parallel",
        "representations": representations,
        "sorted_keys": keys,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    config.save_pretrained(folder)


def import_adapter(
    directory: str,
    out: str,
    *,
    base_model: str | None = None,
    positions: str | None = None,
    intervention: str | None = None,
    component: str | None = None,
    dropout: float | None = None,
    act_fn: str | None = None,
) -> None:
    """Write a directory of pyreft's as a PEFT adapter.

    Args:
        base_model: path or hub id of the base; only its config is read. Needed unless
            the directory is one that :func:`export_adapter` wrote.

    The other arguments are :func:`from_pyreft`'s.

    Raises:
        ValueError: as there, or ``out`` is in use. Nothing is written then.
    """
    if base_model is None and (Path(directory) / CONFIG_NAME).is_file():
        base_model = read_adapter_config(directory, "DIR").base_model_name_or_path
    if not base_model:
        raise ValueError(
            "base model: DIR does not say which one the adapter is for, as pyreft's "
            "never do; pass --base-model"
        )
    try:
        base_config = AutoConfig.from_pretrained(base_model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base model: {base_model!r} cannot be read: {error}"
        ) from error
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(base_config)
    model = from_pyreft(
        directory,
        base,
        positions=positions,
        intervention=intervention,
        component=component,
        dropout=dropout,
        act_fn=act_fn,
    )
    model.peft_config["default"].base_model_name_or_path = base_model
    with _new_directory(out) as folder:
        model.save_pretrained(folder)


@contextmanager
def _new_directory(out: str) -> Iterator[Path]:
    """A folder that becomes ``out`` when all is written, and vanishes otherwise."""
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


def _key(component: str, layer: int, side: int) -> str:
    """pyvene's key of an intervention."""
    if "." in component:
        place = f"comp_{component.replace('.', '_')}"
    else:
        place = f"layer_{layer}_comp_{component}"
    return f"{place}_unit_pos_nunit_1#{side}"


def _shape(state: dict[str, Tensor]) -> tuple[int, int]:
    """Rank and size of an intervention from its state dict."""
    if "rotation" in state:
        size, rank = state["rotation"].shape
    else:
        rank, size = state["weight"].shape
    return rank, size


def _read_adapter(weights: Path) -> tuple[str, Numbers]:
    """The path of the list of layers, and the numbers."""
    numbers: Numbers = {}
    layers = ""
    for key, tensor in load_file(weights).items():
        match = _OURS.fullmatch(key)
        if match is None:
            raise ValueError(
                f"DIR: the adapter also holds {key!r}, for which pyreft's format has "
                "no place; export an adapter without modules_to_save"
            )
        layers = match["list"]
        place = (int(match["layer"]), int(match["side"]))
        numbers.setdefault(place, {})[match["name"]] = tensor
    return layers, numbers


@dataclass
class _Saved:
    """A directory of pyreft's, read and checked.

    Attributes:
        intervention: our name of its kind.
        component: ours.
        numbers: our state dict of each, by layer and side.
        ours: the configuration that an export left in it.
    """

    intervention: str
    component: str
    numbers: Numbers
    ours: LoreftConfig | None

    @property
    def layers(self) -> list[int | str]:
        return sorted({layer for layer, _ in self.numbers})

    @property
    def sides(self) -> int:
        return 1 + max(side for _, side in self.numbers)

    @property
    def rank(self) -> int | dict[str | int, int]:
        """One for all, or one a layer."""
        ranks: dict[str | int, int] = {}
        for (layer, _), state in sorted(self.numbers.items()):
            rank = _shape(state)[0]
            if ranks.setdefault(str(layer), rank) != rank:
                raise ValueError(
                    f"DIR: prefix and suffix of layer {layer} have different ranks, "
                    "which cannot be imported; a layer has one rank"
                )
        one = set(ranks.values())
        return one.pop() if len(one) == 1 else ranks


def _read_directory(
    directory: Path, intervention: str | None, component: str | None
) -> _Saved:
    folder = directory / _TRAINER_FOLDER
    folder = folder if folder.is_dir() else directory
    files = sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}")) if folder.is_dir() else []
    if not files:
        raise ValueError(
            f"DIR: there is no adapter of pyreft's in {str(directory)!r} (looked for "
            f"{_PREFIX}*{_SUFFIX}); name the directory that ReftModel.save wrote, or a "
            "checkpoint of pyreft's trainer"
        )
    kinds, components = _kinds(folder)
    numbers: Numbers = {}
    found, edited = set(), set()
    for file in files:
        key = file.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        layer, side, edits = _place(file, key, components.get(key) or component)
        state = _load(file)
        kind = intervention or kinds.get(key) or _guess(state, file)
        try:
            if kind == "noreft" and "rotate_layer" in state:
                read = read_as_noreft(state)
            else:
                read = read_pyreft_state(kind, state)
        except ValueError as error:
            raise ValueError(f"DIR: {file.name!r}: {error}") from error
        numbers[layer, side] = read
        found.add(kind)
        edited.add(edits)
    for what, several in (("interventions", found), ("components", edited)):
        if len(several) > 1:
            raise ValueError(f"DIR: different {what} in one adapter: {sorted(several)}")
    missing = set(kinds) - {f.name[len(_PREFIX) : -len(_SUFFIX)] for f in files}
    if missing:
        raise ValueError(f"DIR: the file of {sorted(missing)[0]!r} is missing")
    ours = (folder / CONFIG_NAME).is_file()
    return _Saved(
        intervention=found.pop(),
        component=edited.pop(),
        numbers=numbers,
        ours=read_adapter_config(str(folder), "DIR") if ours else None,
    )


def _place(file: Path, key: str, component: str | None) -> tuple[int, int, str]:
    """Layer, side and our component of an intervention.

    Args:
        file: its file, for the message.
        key: pyvene's key of it.
        component: pyreft's, where it is known.
    """
    match = _THEIRS.fullmatch(key)
    read = match and from_pyreft_name(
        component or match["named"] or _path(match["path"], file)
    )
    if not match or not read:
        raise ValueError(
            f"DIR: {file.name!r} is not an intervention on a component that can be "
            f"imported: {', '.join(COMPONENTS)}, or a module's input or output"
        )
    return int(match["layer"] or match["number"]), int(match["side"]), read[1]


def _path(written: str, file: Path) -> str:
    """``model_layers[1]_mlp_output`` as a path, if it can only be one."""
    parts = written.partition("]_")[2].split("_")
    if len(parts) > 2:
        raise ValueError(
            f"component: {file.name!r} has a path whose dots became underscores; pass "
            "it with --component, for example --component self_attn.o_proj.input"
        )
    return ".".join(parts) if len(parts) == 2 else f"block_{parts[0]}"


def _kinds(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Our name of each intervention and pyreft's component of it, by its key, from
    ``config.json`` where there is one."""
    file = folder / "config.json"
    if not file.is_file():
        return {}, {}
    try:
        settings = json.loads(file.read_text())
        keys = settings["sorted_keys"]
        kinds = dict(zip(keys, settings["intervention_types"], strict=True))
        places = [str(place[1]) for place in settings["representations"]]
        components = dict(zip(keys, places, strict=True))
    except (ValueError, LookupError, TypeError, OSError, RecursionError) as error:
        raise ValueError(
            f"DIR: config.json is not one of pyreft's ({error})"
        ) from error
    for key, kind in kinds.items():
        if not isinstance(key, str) or not isinstance(kind, str):
            raise ValueError(
                f"DIR: config.json is not one of pyreft's: {shown(key)} is of the "
                f"class {shown(kind)}"
            )
        if kind not in _CLASSES:
            raise ValueError(
                f"DIR: {key!r} is of the class {kind!r}, which is none of pyreft's six"
            )
    return {key: _CLASSES[kind] for key, kind in kinds.items()}, components


def _load(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(
            f"DIR: {file.name!r} is damaged, or holds something other than tensors, "
            "and is not read"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"DIR: {file.name!r} is not a state dict")
    return dict(state)


def _guess(state: dict[str, Tensor], file: Path) -> str:
    """The kind by its keys, for the trainer's checkpoints, which do not name it."""
    if "rotate_layer" in state:
        return "loreft"
    if "learned_source.weight" in state and "proj_layer.weight" not in state:
        return "orthogonal_direft"
    either = (
        "noreft or direft" if "proj_layer.weight" in state else "consreft or lobireft"
    )
    raise ValueError(
        f"DIR: {file.name!r} may be {either}, and a checkpoint of pyreft's trainer "
        "does not say; pass --intervention"
    )


def _settings(
    saved: _Saved, positions: str | None, dropout: float | None, act_fn: str | None
) -> LoreftConfig:
    """The configuration of what was read, from what was passed and what is inferred."""
    ours = saved.ours
    if positions is None and ours is None:
        raise ValueError(
            "positions: pyreft does not save which positions an adapter was trained "
            "on; pass --positions, for example --positions f7+l7"
        )
    positions = positions or ours.positions  # type: ignore[union-attr]
    two_sided = Positions.parse(positions).two_sided
    if saved.sides == 2 and not two_sided:
        raise ValueError(
            f"positions: {positions} has one side, but there are two interventions a "
            "layer; pass --positions f<n>+l<m>"
        )
    places = {(n, side) for n in saved.layers for side in range(saved.sides)}
    if set(saved.numbers) != places:
        raise ValueError(
            "DIR: some layers have an intervention for prefix and suffix and some for "
            "one of them; an adapter has the same for all"
        )
    if dropout is None:
        dropout = ours.dropout if ours else 0.0
    if act_fn is None and ours:
        act_fn = ours.act_fn
    return LoreftConfig(
        task_type=TaskType.CAUSAL_LM,
        layers=saved.layers,
        positions=positions,
        rank=saved.rank,
        tied_weights=saved.sides == 1,
        intervention=saved.intervention,
        component=saved.component,
        dropout=dropout,
        act_fn=act_fn,
    )


def _fill(model: Any, saved: _Saved) -> None:
    """Put the numbers into a freshly built adapter."""
    for path, module in model.named_modules():
        if isinstance(module, LoreftDecoderLayer):
            layer = int(path.rpartition(".")[2])
            for side, container in enumerate((module.intv_0, module.intv_1)):
                if (layer, side) in saved.numbers:
                    container["default"].load_state_dict(saved.numbers[layer, side])
