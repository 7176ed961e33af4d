"""A module of the base model with its interventions around it.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from axolotl_reft.core.joint_edit import can_join, joint_edit
from axolotl_reft.core.scatter import edit
from axolotl_reft.core.shared_rotations import lent
from axolotl_reft.kernels import dispatch as fused
from axolotl_reft.prompts.positions import Positions, PromptSpans
from axolotl_reft.prompts.turns import Turns
from axolotl_reft.settings.components import Site, find_site
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.lora import LayerLora, linear_modules
from axolotl_reft.tuner.prompts import PromptTracker

_INPUT, _OUTPUT = Site("", "input"), Site("", "output")


class LoreftDecoderLayer(nn.Module, BaseTunerLayer):
    """A decoder layer of which something is edited: its output, or what is within.

    Around the layer and not inside it, so that gradient checkpointing, which replays
    what is inside, never replays an edit of its output. Everything else asked of it,
    such as a layer's ``attention_type``, is answered by the layer; "DecoderLayer" in
    the name is what axolotl's offloading of layers looks for.

    Components within the layer are edited by hooks on its modules, and LoRA's additions
    to its linear modules are made by hooks on them. Those are replayed,
    so a checkpointed layer is given the batch of its own forward to be replayed with.
    """

    # pyreft's #0 and #1; the second is the suffix's, where that is untied.
    adapter_layer_names = ("intv_0", "intv_1", "intv_lora")
    other_param_names = ("positions", "turns", "sites")

    def __init__(
        self, base_layer: nn.Module, tracker: PromptTracker, text_config: Any
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.intv_0 = nn.ModuleDict()
        self.intv_1 = nn.ModuleDict()
        self.intv_lora = nn.ModuleDict()
        self.tracker = tracker
        tracker.layers.append(self)
        self.text_config = text_config
        self.positions: dict[str, Positions] = {}
        self.turns: dict[str, Turns] = {}
        self.sites: dict[str, Site] = {}
        self._everywhere = False
        self._handles: dict[Site, RemovableHandle] = {}
        self._lora_handles: dict[str, RemovableHandle] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(
        self, adapter_name: str, config: LoreftConfig, rank: int | None
    ) -> None:
        """Give the layer fresh numbers under an adapter's name.

        Args:
            rank: of its interventions; None for a layer that the adapter does not edit,
                and where it has at most LoRA.
        """
        if rank is not None:
            self._add_interventions(adapter_name, config, rank)
        if config.lora is not None:
            self._add_lora(adapter_name, config.lora)
        self._hook()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _add_interventions(
        self, adapter_name: str, config: LoreftConfig, rank: int
    ) -> None:
        from axolotl_reft.core.interventions import INTERVENTION_CLASSES

        positions = Positions.parse(config.positions)
        untied = positions.two_sided and not config.tied_weights
        site, width = find_site(config.component, self.base_layer, self.text_config)
        for container in (self.intv_0, self.intv_1)[: 2 if untied else 1]:
            intervention = INTERVENTION_CLASSES[config.intervention](
                embed_dim=width,
                low_rank_dimension=rank,
                dropout=config.dropout,
                act_fn=config.act_fn,
            )
            self._put(container, adapter_name, intervention)
        self.positions[adapter_name] = positions
        self.turns[adapter_name] = Turns.parse(config.turns, config.turn_markers)
        if not positions.everywhere:
            self.tracker.watch(adapter_name, self.turns[adapter_name])
        self.sites[adapter_name] = site

    def _add_lora(self, adapter_name: str, settings: dict[str, Any]) -> None:
        sizes = linear_modules(self.base_layer, settings["target_modules"])
        r, alpha, dropout = settings["r"], settings["alpha"], settings["dropout"]
        lora = LayerLora(sizes, r=r, alpha=alpha, dropout=dropout)
        self._put(self.intv_lora, adapter_name, lora)
        for path in sizes.keys() - self._lora_handles.keys():
            module = self.base_layer.get_submodule(path)
            # First: an edit of the module's output is one of the sum.
            self._lora_handles[path] = module.register_forward_hook(
                partial(self._add_lora_output, path), prepend=True
            )

    def _put(self, container: nn.ModuleDict, name: str, module: nn.Module) -> None:
        # PEFT's low_cpu_mem_usage makes it on the meta device and fills it later.
        if not any(p.is_meta for p in module.parameters()):
            module.to(_device_of(self.base_layer))
        container[name] = module.train(self.training)

    def _hook(self) -> None:
        """One hook on each module of the layer of which something is edited, and none
        on linear modules to which nothing is added any more."""
        self._everywhere = any(p.everywhere for p in self.positions.values())
        loras: list[Any] = list(self.intv_lora.values())
        for path in list(self._lora_handles):
            if not any(lora.has(path) for lora in loras):
                self._lora_handles.pop(path).remove()
        wanted = {site for site in self.sites.values() if site.path}
        for site in self._handles.keys() - wanted:
            self._handles.pop(site).remove()
        for site in wanted - self._handles.keys():
            module = self.base_layer.get_submodule(site.path)
            if site.side == "input":
                self._handles[site] = module.register_forward_pre_hook(
                    partial(self._edit_input, site), with_kwargs=True
                )
            else:
                self._handles[site] = module.register_forward_hook(
                    partial(self._edit_output, site)
                )

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.tracker.unwatch(adapter_name)
        self._hook()

    def forget_adapter(self, adapter_name: str) -> None:
        """As before it was added; what is active stays so, by name."""
        for attribute in self.adapter_layer_names + self.other_param_names:
            held = getattr(self, attribute)
            if adapter_name in held:
                del held[adapter_name]
        self.tracker.unwatch(adapter_name)
        self._hook()

    def detach(self) -> None:
        """Leave the layer as it was."""
        for handles in (self._handles, self._lora_handles):
            for handle in handles.values():
                handle.remove()
            handles.clear()

    def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
        raise cannot_merge()

    @property
    def asks_for_prompts(self) -> bool:
        """Whether an adapter that edits now does so at some positions of a prompt."""
        own = (self.positions.get(name) for name in self._adapters())
        return any(one is not None and not one.everywhere for one in own)

    def prompts(self, name: str) -> PromptSpans | None:
        """What the adapter takes for prompts in the forward under way; None where it
        sees none, or edits every token."""
        if self.positions[name].everywhere:
            return None
        return self.tracker.prompts(self.turns[name])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """In a decode step the base layer's own, unless something hangs on this one:
        nn.Module's, and its __getattr__, would take as long as everything else here."""
        if self.tracker.prompt_has_gone_by and not (
            self._everywhere
            or self._forward_hooks
            or self._forward_pre_hooks
            or self._compiled_call_impl
            or "forward" in self.__dict__  # accelerate's hooks
        ):
            base_layer: Any = self._modules["base_layer"]
            return base_layer(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        planned = None if is_compiling() else self.tracker.planned(self)
        if planned is not None:
            return self._edit_as_planned(planned, self.base_layer(*args, **kwargs))
        args, kwargs = self._edit_input(_INPUT, self, args, kwargs)
        # Not by the handles: torch.compile cannot look a site up among them.
        within = [
            name
            for name in self._adapters()
            if name in self.intv_lora or (name in self.sites and self.sites[name].path)
        ]
        if within:
            self._find_positions(within)
            output = self._call_replayably(*args, **kwargs)
        else:
            output = self.base_layer(*args, **kwargs)
        before_BTD = _first(output)
        planned = None if is_compiling() else self.tracker.plan(self, before_BTD)
        if planned is not None:
            return self._edit_as_planned(planned, output)
        output = self._edit_output(_OUTPUT, self, args, output)
        if _first(output) is not before_BTD:
            self.tracker.record(before_BTD, _first(output))
        return output

    def only_edit(self) -> tuple[str, list[Any]] | None:
        """The adapter and its interventions, where all that happens to the layer in
        this forward is an edit of its output by one adapter at some positions."""
        # Past nn.Module's getattr: it is asked of all layers while a device waits.
        own: Any = self._modules
        prefix, suffix = own["intv_0"]._modules, own["intv_1"]._modules
        lora = own["intv_lora"]._modules
        names = [one for one in self._adapters() if one in prefix or one in lora]
        if len(names) != 1 or names[0] in lora:
            return None
        (name,) = names
        site = self.sites[name]
        if site.path or site.side != "output" or self.positions[name].everywhere:
            return None
        return name, [side[name] for side in (prefix, suffix) if name in side]

    def indices(self, name: str) -> tuple[Tensor, ...] | None:
        """What of the forward under way an adapter edits at its positions, by
        intervention."""
        tied = name not in self.intv_1
        return self.tracker.indices(self.positions[name], self.turns[name], tied, name)

    def _edit_as_planned(self, planned: Callable[[Tensor], Tensor], output: Any) -> Any:
        before_BTD = _first(output)
        edited_BTD = planned(before_BTD)
        self.tracker.record(before_BTD, edited_BTD)
        return _with_first(output, edited_BTD)

    def _find_positions(self, names: list[str]) -> None:
        """Ask for positions ahead of the layer: compiled checkpointing lets what is
        inside of it note nothing, and would break the graph."""
        for name in names:
            positions = self.positions.get(name)
            if positions is not None and not positions.everywhere:
                self.indices(name)

    def _call_replayably(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward; gradient checkpointing replays it with this batch."""
        layer: Any = self.base_layer
        checkpoint = layer.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is None or not layer.training:
            return layer(*args, **kwargs)

        def checkpoint_with_batch(function: Any, *inputs: Any, **options: Any) -> Any:
            if _is_reentrant(checkpoint) and not is_compiling():
                inputs = _with_gradient(inputs)
            return checkpoint(self.tracker.replayable(function), *inputs, **options)

        layer._gradient_checkpointing_func = checkpoint_with_batch
        try:
            return layer(*args, **kwargs)
        finally:
            layer._gradient_checkpointing_func = checkpoint

    def _edit_input(
        self, site: Site, module: nn.Module, args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        if not self._editing(site):
            return args, kwargs
        if args:
            return (self._edit(args[0], site), *args[1:]), kwargs
        edited_BTD = self._edit(kwargs["hidden_states"], site)
        return args, kwargs | {"hidden_states": edited_BTD}

    def _edit_output(
        self, site: Site, module: nn.Module, args: Any, output: Any
    ) -> Any:
        if not self._editing(site):
            return output
        return _with_first(output, self._edit(_first(output), site))

    def _editing(self, site: Site) -> list[str]:
        """The adapters that edit a site in this forward, in the order of edits."""
        return [name for name in self._adapters() if self.sites.get(name) == site]

    def _adapters(self) -> list[str]:
        """Those of this forward: the active ones, or those of the batch's rows."""
        if self.disable_adapters:
            return []
        rows = self.tracker.adapter_rows
        return self.active_adapters if rows is None else rows.adapters

    def _add_lora_output(
        self, path: str, module: nn.Module, args: Any, output: Tensor
    ) -> Tensor:
        total = output
        for name in self._adapters():
            lora: Any = self.intv_lora[name] if name in self.intv_lora else None
            if lora is None or not lora.has(path):
                continue
            if self.tracker.adapter_rows is None:
                total = total + lora(path, args[0])
                continue
            # Vectors of the adapter's rows alone.
            tokens = self.tracker.tokens(name, output)
            x = args[0].reshape(-1, args[0].shape[-1]).index_select(0, tokens)
            flat = total.reshape(-1, total.shape[-1])
            added = (flat.index_select(0, tokens) + lora(path, x)).to(flat.dtype)
            total = flat.index_copy(0, tokens, added).view(output.shape)
        return total.to(output.dtype)

    def outer_interventions(self) -> list[nn.Module]:
        """Those that edit the layer's own input or output in this forward."""
        return [
            one
            for site in (_INPUT, _OUTPUT)
            for name in self._editing(site)
            for one in self._interventions(name)
        ]

    def _interventions(self, name: str) -> list[Any]:
        return [
            container[name]
            for container in (self.intv_0, self.intv_1)
            if name in container
        ]

    def _edit(self, h_BTD: Tensor, site: Site) -> Tensor:
        # Not what is within: checkpointing replays it, when there is nothing to share.
        matrices = {} if site.path else self.tracker.rotations()
        for name in self._editing(site):
            interventions = self._interventions(name)
            with lent(interventions, matrices) if matrices else nullcontext():
                h_BTD = self._edit_by(name, interventions, h_BTD)
        return h_BTD

    def _edit_by(self, name: str, interventions: list[Any], h_BTD: Tensor) -> Tensor:
        positions = self.positions[name]
        if not positions.everywhere:
            indices = self.indices(name)
            if indices is None:
                return h_BTD
            if fused.can_edit(h_BTD, interventions):
                return fused.edit(h_BTD, indices, interventions)
            if is_compiling() and can_join(interventions):
                jointly = partial(joint_edit, interventions, indices[0].shape[0])
                return edit(h_BTD, [torch.cat(indices)], [jointly])
            return edit(h_BTD, indices, interventions)
        if self.tracker.adapter_rows is None:
            return interventions[0](h_BTD).to(h_BTD.dtype)
        tokens = self.tracker.tokens(name, h_BTD)
        return edit(h_BTD, [tokens], interventions)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, h_BTD: Tensor) -> Any:
    return (h_BTD, *output[1:]) if isinstance(output, tuple) else h_BTD


def _is_reentrant(checkpoint: Any) -> bool:
    """Whether a layer's checkpointing function, a ``partial`` of torch's, is."""
    return getattr(checkpoint, "keywords", {}).get("use_reentrant", True) is not False


def _with_gradient(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs of which one requires a gradient: reentrant checkpointing gives none to
    what is inside a layer otherwise, as below the first edit nothing requires one."""
    if not torch.is_grad_enabled() or any(
        isinstance(value, Tensor) and value.requires_grad for value in inputs
    ):
        return inputs
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


def cannot_merge() -> ValueError:
    """Why there is nothing that merging could mean."""
    return ValueError(
        "a LoReFT adapter cannot be merged into the base model: it edits hidden states "
        "at some positions of a prompt, which no change of the weights can do. Ship "
        "the adapter (a few megabytes) beside the base and load it with "
        "PeftModel.from_pretrained, after import axolotl_reft; unload() gives back the "
        "base model"
    )


def _device_of(module: nn.Module) -> torch.device:
    """Where the module computes; the CPU for one without memory (meta)."""
    for parameter in module.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")
