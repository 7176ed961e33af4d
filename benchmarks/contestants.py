"""Who is measured: a model to call with a batch, and the numbers it trains.

Each is built on a frozen base. Libraries are imported where they are needed, since no
environment has all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from benchmarks.base import Batch, Setting


@dataclass
class Contestant:
    """A model that trains.

    Attributes:
        loss: of a batch.
        trained: parameters an optimizer steps; none for the floor.
        collate: what its data collator makes of a batch, before the step.
    """

    loss: Callable[[Batch], Tensor]
    trained: list[nn.Parameter]
    model: nn.Module
    collate: Callable[[Batch], Batch] = lambda batch: batch


def floor(base: nn.Module, setting: Setting) -> Contestant:
    """The least that a frozen base costs with the logits of every token: its forward,
    and the backward through its activations down to the first edited layer, whose
    output is made a leaf."""
    layer: Any = base.get_submodule(f"model.layers.{setting.edited_layers[0]}")

    def leaf(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].detach().requires_grad_(), *output[1:])
        return output.detach().requires_grad_()

    layer.register_forward_hook(leaf)
    return _plain(base, setting)


def floor_in_a_graph(base: nn.Module, setting: Setting) -> Contestant:
    """The floor where it is compiled: a graph can make no leaf, so zeros that require a
    gradient are added where it would be."""
    layer: Any = base.get_submodule(f"model.layers.{setting.edited_layers[0]}")
    size = setting.batch, setting.length, setting.hidden_size
    dtype = getattr(torch, setting.dtype)
    zeros_BTD = torch.zeros(size, dtype=dtype, device=setting.device).requires_grad_()
    layer.register_forward_hook(lambda module, args, output: output + zeros_BTD)
    contestant = _plain(base, setting)

    def loss(batch: Batch) -> Tensor:
        zeros_BTD.grad = None
        return contestant.loss(batch)

    return replace(contestant, loss=loss)


def autocast(setting: Setting) -> torch.autocast:
    """As a trainer has it with ``bf16: true``; nothing in float32."""
    lower = setting.dtype != "float32"
    return torch.autocast(setting.device, getattr(torch, setting.dtype), enabled=lower)


def _plain(model: nn.Module, setting: Setting) -> Contestant:
    def loss(batch: Batch) -> Tensor:
        with autocast(setting):
            return model(**batch.inputs, use_cache=False).loss

    trained = [p for p in model.parameters() if p.requires_grad]
    return Contestant(loss, trained, model)


def ours(base: nn.Module, setting: Setting) -> Contestant:
    """LoReFT as a PEFT method, with the logits of every token, as the others have."""
    from peft import get_peft_model

    from axolotl_reft import PromptCounter

    model = get_peft_model(base, our_config(setting)).train()
    collate = _collator(setting, partial(PromptCounter.of, model))
    return replace(_plain(model, setting), collate=collate)


def labelled(base: nn.Module, setting: Setting) -> Contestant:
    """Ours with the logits of labelled tokens alone, as the plugin trains it."""
    from axolotl_reft import LabelledLogits, PromptCounter

    contestant = ours(base, setting)
    counter = partial(PromptCounter.of, contestant.model)
    return replace(contestant, collate=_collator(setting, LabelledLogits, counter))


def frozen_prompt(name: str, model: nn.Module) -> Callable[[], None]:
    """Compute a model's prompts as the contestant's name says, and return what begins
    each of its steps."""
    from axolotl_reft.training.frozen_prompt import use_frozen_prompt
    from axolotl_reft.tuner.model import hooks_of

    use_frozen_prompt(model, _FROZEN_PROMPT.get(name, False), "4GB")
    if name != "frozen":
        return lambda: None
    hooks: Any = hooks_of(model.get_base_model())  # type: ignore[operator]
    return hooks.frozen_prompt.kept.clear


def in_two_parts(name: str, base: nn.Module, setting: Setting) -> Contestant:
    """Labelled, with the tokens before the first edited one computed apart."""
    contestant = labelled(base, setting)
    begin = frozen_prompt(name, contestant.model)

    def loss(batch: Batch) -> Tensor:
        begin()
        return contestant.loss(batch)

    return replace(contestant, loss=loss)


def _collator(
    setting: Setting, *wrappers: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[[Batch], Batch]:
    """Apply this package's data collators, on the host, as a trainer does."""

    def collate(batch: Batch) -> Batch:
        host = {name: tensor.cpu() for name, tensor in batch.inputs.items()}
        make: Callable[..., Any] = partial(dict, host)
        for wrapper in wrappers:
            make = wrapper(make)
        inputs = send_to_device(make(), setting.device)
        return replace(batch, inputs=inputs)

    return collate


def operations(base: nn.Module, setting: Setting) -> Contestant:
    """Ours without its kernels: on a GPU, by operations of torch's alone."""
    from axolotl_reft.kernels import dispatch

    contestant = ours(base, setting)

    def loss(batch: Batch) -> Tensor:
        with patch.object(dispatch, "_triton_workspace", lambda: None):
            return contestant.loss(batch)

    return replace(contestant, loss=loss)


def our_config(setting: Setting) -> Any:
    from axolotl_reft import LoreftConfig

    sides = (
        f"f{setting.first}" * bool(setting.first),
        f"l{setting.last}" * bool(setting.last),
    )
    return LoreftConfig(
        task_type="CAUSAL_LM",
        layers=[*setting.edited_layers],
        positions="+".join(filter(None, sides)),
        rank=setting.rank,
        tied_weights=setting.tied,
    )


def lora(base: nn.Module, setting: Setting) -> Contestant:
    """PEFT's LoRA on all linear layers of the same decoder layers."""
    from peft import LoraConfig, get_peft_model

    layers = "|".join(map(str, setting.edited_layers))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=setting.rank,
        target_modules=rf".*\.layers\.({layers})\.\w+\.\w+_proj",
    )
    return _plain(get_peft_model(base, config).train(), setting)


def pyreft(base: nn.Module, setting: Setting) -> Contestant:
    """pyreft's own; its positions are computed beforehand, as its collator does."""
    import pyreft as library

    sides = 2 if setting.first and setting.last and not setting.tied else 1
    layers = setting.edited_layers * sides
    # On a CPU it takes two minutes at Llama-3-8B's size (see parts.py).
    with torch.device(setting.device):
        representations = [
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": setting.rank,
                "intervention": library.LoreftIntervention(
                    embed_dim=setting.hidden_size,
                    low_rank_dimension=setting.rank,
                    dtype=torch.float32,
                ),
            }
            for layer in layers
        ]
    config = library.ReftConfig(representations=representations)
    model: Any = library.get_reft_model(base, config, set_device=False)
    model.set_device(setting.device)

    def loss(batch: Batch) -> Tensor:
        inputs = dict(batch.inputs)
        labels = inputs.pop("labels")
        where = {"sources->base": (None, locations(batch, setting, sides))}
        with autocast(setting):
            _, output = model(
                inputs, unit_locations=where, labels=labels, use_cache=False
            )
        return output.loss

    trained = [p for one in model.interventions.values() for p in one.parameters()]
    return Contestant(loss, trained, model)


def locations(batch: Batch, setting: Setting, sides: int) -> list[list[list[int]]]:
    """pyreft's positions: for each intervention, for each sample, the tokens."""
    prefix = [list(range(setting.first)) for _ in batch.prompts]
    suffix = [list(range(p - setting.last, p)) for p in batch.prompts]
    count = len(setting.edited_layers)
    if sides == 2:
        return [prefix] * count + [suffix] * count
    return [[a + b for a, b in zip(prefix, suffix, strict=True)]] * count


def adapters(base: nn.Module, setting: Setting) -> Contestant:
    """AdapterHub's LoReFT, whose suffix is that of the whole sequence."""
    import adapters as library

    library.init(base)
    model: Any = base
    config = library.LoReftConfig(
        layers=setting.edited_layers,
        r=setting.rank,
        prefix_positions=setting.first,
        suffix_positions=setting.last,
        tied_weights=setting.tied,
        dropout=0.0,
    )
    model.add_adapter("loreft", config=config)
    model.train_adapter("loreft")
    return _plain(model.train(), setting)


# When contestants compute a batch in two parts; all others never do.
_FROZEN_PROMPT: dict[str, str | bool] = {"frozen": True, "kept": True, "auto": "auto"}

CONTESTANTS: dict[str, Callable[[nn.Module, Setting], Contestant]] = {
    "floor": floor,
    "floor-in-a-graph": floor_in_a_graph,
    "ours": ours,
    "labelled": labelled,
    "frozen": partial(in_two_parts, "frozen"),
    "kept": partial(in_two_parts, "kept"),
    "auto": partial(in_two_parts, "auto"),
    "operations": operations,
    "lora": lora,
    "pyreft": pyreft,
    "adapters": adapters,
}
