"""A decoder layer with its interventions around it.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.prompts.spans import PromptSpans
from axolotl_reft.settings.components import Site, find_site
from axolotl_reft.settings.spec import AdapterSpec
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.context import ForwardContext, ModelState
from axolotl_reft.tuner.executor import edit_hidden_states
from axolotl_reft.tuner.lora import LayerLora, linear_modules
from axolotl_reft.tuner.replay import call_replayably

_INPUT, _OUTPUT = Site("", "input"), Site("", "output")


class LoreftDecoderLayer(nn.Module, BaseTunerLayer):
    """A decoder layer whose output, or a module inside it, is edited.

    Around the layer and not inside it, so that gradient checkpointing, which replays
    the layer, never replays an edit of its output. Every other attribute, such as a
    layer's ``attention_type``, is the layer's; "DecoderLayer" in the name is what
    axolotl's offloading of layers looks for.

    Components within the layer are edited by hooks on its modules, and LoRA's additions
    to its linear modules are made by hooks on them. Those are replayed, so a
    checkpointed layer is replayed with the context of its own forward (``replay.py``).
    """

    # pyreft's #0 and #1; the second is the suffix's, where that is untied.
    adapter_layer_names = ("intv_0", "intv_1", "intv_lora")
    other_param_names = ("specs", "sites")

    def __init__(
        self, base_layer: nn.Module, state: ModelState, text_config: Any
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.intv_0 = nn.ModuleDict()
        self.intv_1 = nn.ModuleDict()
        self.intv_lora = nn.ModuleDict()
        self.state = state
        state.layers.append(self)
        self.text_config = text_config
        self.specs: dict[str, AdapterSpec] = {}
        self.sites: dict[str, Site] = {}
        self._edits_every_token = False
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

    # --- adapters come and go ------------------------------------------------------

    def update_layer(
        self, adapter_name: str, config: LoreftConfig, rank: int | None
    ) -> None:
        """Give the layer fresh parameters under an adapter's name.

        Args:
            rank: of its interventions; None for a layer that the adapter does not edit,
                which has at most LoRA.
        """
        if rank is not None:
            self._add_interventions(adapter_name, config.spec(), rank)
        if config.lora is not None:
            self._add_lora(adapter_name, config.lora)
        self._hook()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _add_interventions(
        self, adapter_name: str, spec: AdapterSpec, rank: int
    ) -> None:
        site, width = find_site(spec.component, self.base_layer, self.text_config)
        for container in (self.intv_0, self.intv_1)[: spec.sides]:
            intervention = INTERVENTION_CLASSES[spec.kind.name](
                embed_dim=width,
                low_rank_dimension=rank,
                dropout=spec.dropout,
                act_fn=spec.act_fn,
            )
            self._put(container, adapter_name, intervention)
        self.specs[adapter_name] = self.state.adapters[adapter_name] = spec
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
        """Keep one hook on each edited module within the layer, and on each linear
        module that a LoRA adds to; remove the others."""
        self._edits_every_token = any(
            spec.positions.everywhere for spec in self.specs.values()
        )
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
        self._forget_state(adapter_name)

    def forget_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's parts; the names of the active ones stay."""
        for attribute in self.adapter_layer_names + self.other_param_names:
            held = getattr(self, attribute)
            if adapter_name in held:
                del held[adapter_name]
        self._forget_state(adapter_name)

    def _forget_state(self, adapter_name: str) -> None:
        self.state.adapters.pop(adapter_name, None)
        self.state.stacks.clear()
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
        """Whether an active adapter edits prompt positions here."""
        specs = (self.specs.get(name) for name in self._adapters(None))
        return any(spec and not spec.positions.everywhere for spec in specs)

    def prompts(self, name: str) -> PromptSpans | None:
        """Return the adapter's prompts in the forward under way; None where there is
        none, or every token is edited."""
        spec = self.specs[name]
        if spec.positions.everywhere:
            return None
        return self.state.context.spans(spec.turns)

    # --- a forward -----------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base layer directly in a decode step, unless something hangs on this
        module: nn.Module's call would take as long as everything else here."""
        context = self.state.thread.context
        if (
            context is not None
            and context.is_decode_step
            and not (
                self._edits_every_token
                or self._forward_hooks
                or self._forward_pre_hooks
                or self._compiled_call_impl
                or "forward" in self.__dict__  # accelerate's hooks
            )
        ):
            base_layer: Any = self._modules["base_layer"]
            return base_layer(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._edit_input(_INPUT, self, args, kwargs)
        within = self._edited_within()
        if within:
            # Ahead of the layer: compiled checkpointing lets what is inside of it note
            # nothing, and would break the graph.
            context = self.state.context
            for name in within:
                if name in self.specs and not self.specs[name].positions.everywhere:
                    context.indices(name)
            output = call_replayably(self.base_layer, self.state, *args, **kwargs)
        else:
            output = self.base_layer(*args, **kwargs)
        edited = self._edit_output(_OUTPUT, self, args, output)
        if edited is not output:
            self.state.context.record(_first(output), _first(edited))
        return edited

    def _edited_within(self) -> list[str]:
        """Return the adapters of this forward that act inside the layer."""
        # Not by the handles: torch.compile cannot look a site up among them.
        return [
            name
            for name in self._adapters(self.state.thread.context)
            if name in self.intv_lora or (name in self.sites and self.sites[name].path)
        ]

    def _edit_input(
        self, site: Site, module: nn.Module, args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        if not self._adapters_at(site):
            return args, kwargs
        if args:
            return (self._edit(args[0], site), *args[1:]), kwargs
        edited_BTD = self._edit(kwargs["hidden_states"], site)
        return args, kwargs | {"hidden_states": edited_BTD}

    def _edit_output(
        self, site: Site, module: nn.Module, args: Any, output: Any
    ) -> Any:
        if not self._adapters_at(site):
            return output
        h_BTD = _first(output)
        edited_BTD = self._edit(h_BTD, site)
        return output if edited_BTD is h_BTD else _with_first(output, edited_BTD)

    def _edit(self, h_BTD: Tensor, site: Site) -> Tensor:
        """Return hidden states edited by each adapter of this site, in turn."""
        context = self.state.context
        # Within a layer checkpointing replays edits, of which nothing was made ready;
        # and a layer that is compiled alone makes its own, in its graph.
        plan = context.plan
        if site.path or (is_compiling() and not context.is_compiled):
            plan = None
        for name in self._adapters_at(site):
            if self.specs[name].positions.everywhere:
                indices = None
                if context.adapter_rows is not None:
                    indices = context.row_tokens(name, h_BTD)
            elif (indices := context.indices(name)) is None:
                continue
            edit = plan and plan.take(self, site.side, name)
            if edit:
                h_BTD = edit(h_BTD, indices)
            else:
                h_BTD = edit_hidden_states(h_BTD, indices, self.interventions(name))
        return h_BTD

    def outer_edits(
        self, context: ForwardContext
    ) -> Iterator[tuple[str, str, list[Any]]]:
        """Yield side, adapter and interventions of each edit of the layer's own input
        or output in a forward."""
        for name in self._adapters(context):
            site = self.sites.get(name)
            if site is not None and not site.path:
                yield site.side, name, self.interventions(name)

    def interventions(self, name: str) -> list[Any]:
        """Return an adapter's interventions: one, or one each for prefix and suffix."""
        # Past nn.Module's getattr: it is asked of all layers in every step.
        sides = (self._modules["intv_0"], self._modules["intv_1"])
        return [side._modules[name] for side in sides if side and name in side._modules]

    def _adapters_at(self, site: Site) -> list[str]:
        """Return the adapters that edit a site in this forward, in their order."""
        adapters = self._adapters(self.state.thread.context)
        return [name for name in adapters if self.sites.get(name) == site]

    def _adapters(self, context: ForwardContext | None) -> list[str]:
        """Return the adapters of a forward: the active ones, or its rows'."""
        if self.disable_adapters:
            return []
        rows = None if context is None else context.adapter_rows
        return self.active_adapters if rows is None else rows.adapters

    def _add_lora_output(
        self, path: str, module: nn.Module, args: Any, output: Tensor
    ) -> Tensor:
        context, total = self.state.thread.context, output
        for name in self._adapters(context):
            lora: Any = self.intv_lora[name] if name in self.intv_lora else None
            if lora is not None and lora.has(path):
                total = lora.add_to(total, path, args[0], context, name)
        return total.to(output.dtype)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, h_BTD: Tensor) -> Any:
    return (h_BTD, *output[1:]) if isinstance(output, tuple) else h_BTD


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
    """Return the device that a module is on; the CPU for the meta device."""
    for parameter in module.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")
