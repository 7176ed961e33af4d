"""A decoder layer with its interventions around it.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig

from axolotl_reft.core.interventions import INTERVENTION_CLASSES, Intervention
from axolotl_reft.core.strength import at_strength
from axolotl_reft.prompts.spans import PromptSpans
from axolotl_reft.settings.components import find_site, is_inside_experts
from axolotl_reft.settings.spec import AdapterSpec
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.context import BASE, ModelState
from axolotl_reft.tuner.executor import edit_hidden_states
from axolotl_reft.tuner.layout import (
    Layout,
    TokenVectors,
    hidden_states_of,
    not_told,
    token_vectors,
    with_hidden_states,
)
from axolotl_reft.tuner.lora import LayerLora, linear_modules
from axolotl_reft.tuner.replay import call_with_context

# A site is a module's path in the layer and its side; these are the layer's own.
_INPUT, _OUTPUT = ".input", ".output"


class LoreftDecoderLayer(nn.Module, BaseTunerLayer):
    """A decoder layer whose output, or a module inside it, is edited.

    Around the layer and not inside it, so that gradient checkpointing, which replays
    the layer, never replays an edit of its output. Hooks on modules within the layer
    edit these and add LoRA; they are replayed, with the context of their own forward
    (``replay.py``). Other attributes, such as ``attention_type``, are the layer's, and
    axolotl's offloading of layers looks for "DecoderLayer" in the name.
    """

    # pyreft's #0 and #1; the second is the suffix's, where that is untied.
    adapter_layer_names = ("intv_0", "intv_1", "intv_lora")
    other_param_names = ("specs", "sites", "sizes")

    def __init__(
        self, base_layer: nn.Module, state: ModelState, text_config: PretrainedConfig
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self.intv_0 = nn.ModuleDict()
        self.intv_1 = nn.ModuleDict()
        self.intv_lora = nn.ModuleDict()
        self.state = state
        state.layers.append(self)
        self.text_config = text_config
        self.specs: dict[str, AdapterSpec] = {}
        self.sites: dict[str, str] = {}
        self.sizes: dict[str, int] = {}  # of the edited vectors
        self._handles: dict[str, RemovableHandle] = {}
        self._refresh()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    # --- adapters come and go ------------------------------------------------------

    def update_layer(
        self, name: str, config: LoreftConfig, spec: AdapterSpec, rank: int | None
    ) -> None:
        """Give the layer fresh parameters under an adapter's name; no rank, and no
        interventions, where the adapter adds LoRA alone."""
        lora = config.lora
        if rank is not None:
            site, size = find_site(spec.component, self.base_layer, self.text_config)
            if not spec.positions.everywhere and is_inside_experts(
                self.base_layer, site.rpartition(".")[0]
            ):
                raise ValueError(
                    f"component: {spec.component!r} is inside of experts, which see "
                    f"tokens in another order: positions: {spec.positions} cannot be "
                    "found there; edit mlp_output, or use positions: all"
                )
            for container in (self.intv_0, self.intv_1)[: spec.sides]:
                container[name] = INTERVENTION_CLASSES[spec.kind.name](
                    embed_dim=size,
                    low_rank_dimension=rank,
                    dropout=spec.dropout,
                    act_fn=spec.act_fn,
                    init_weights=config.init_weights,
                )
            self.specs[name] = self.state.adapters[name] = spec
            # A vocabulary's size is there where embeddings are trained.
            if spec.positions.everywhere or lora or config.vocab_size:
                self.state.change_every_token.add(name)
            self.sites[name], self.sizes[name] = site, size
        if lora is not None:
            sizes = linear_modules(self.base_layer, lora["target_modules"])
            self.intv_lora[name] = LayerLora(
                sizes, lora["r"], lora["alpha"], lora["dropout"]
            )
        for container in (self.intv_0, self.intv_1, self.intv_lora):
            if name in container:
                module = container[name].train(self.training)
                # PEFT's low_cpu_mem_usage makes it on the meta device, filled later.
                if not any(p.is_meta for p in module.parameters()):
                    module.to(_device_of(self.base_layer))
        self._refresh()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _refresh(self) -> None:
        """Follow the adapters: one hook within the layer on each edited side of a
        module, and one on each module with a LoRA."""
        specs, sites = self.specs.values(), set(self.sites.values())
        self._edits_every_token = any(spec.positions.everywhere for spec in specs)
        self._edits_input = _INPUT in sites
        wanted = sites - {_INPUT, _OUTPUT}
        self._within = {name for name, site in self.sites.items() if site in wanted}
        self._within |= self.intv_lora.keys()
        loras = cast("list[LayerLora]", list(self.intv_lora.values()))
        wanted |= {f"{path}.lora" for lora in loras for path in lora.paths}
        for site in self._handles.keys() - wanted:
            self._handles.pop(site).remove()
        for site in wanted - self._handles.keys():
            path, _, side = site.rpartition(".")
            module = self.base_layer.get_submodule(path)
            if side == "input":
                edit_input = partial(self._edit_input, site)
                handle = module.register_forward_pre_hook(edit_input, with_kwargs=True)
            elif side == "output":
                handle = module.register_forward_hook(partial(self._edit_output, site))
            else:  # first: an edit of the module's output is one of the sum
                add = partial(self._add_lora, path)
                handle = module.register_forward_hook(add, prepend=True)
            self._handles[site] = handle

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.forget_adapter(adapter_name)

    def forget_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's parts; the names of the active ones stay."""
        for attribute in self.adapter_layer_names + self.other_param_names:
            held = getattr(self, attribute)
            if adapter_name in held:
                del held[adapter_name]
        self.state.forget_adapter(adapter_name)
        self._refresh()

    def detach(self) -> None:
        """Leave the layer as it was."""
        while self._handles:
            self._handles.popitem()[1].remove()

    @property
    def asks_for_prompts(self) -> bool:
        """Whether an active adapter edits prompt positions here."""
        specs = (self.specs.get(name) for name in self._adapters())
        return any(spec and not spec.positions.everywhere for spec in specs)

    def prompts(self, name: str) -> PromptSpans | None:
        """Return this forward's prompts; None for none, or if all tokens are edited."""
        spec = self.specs[name]
        if spec.positions.everywhere:
            return None
        return self.state.context.spans(spec.turns)

    # --- a forward -----------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base layer directly in a decode step: nn.Module's call, for what
        hangs on this module, would take as long as everything else here."""
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
        if self._edits_input:
            args, kwargs = self._edit_input(_INPUT, self, args, kwargs)
        base_layer: Any = self._modules["base_layer"]  # faster than nn.Module's getattr
        within = self._within and [n for n in self._adapters() if n in self._within]
        if within:
            # Before the layer: a compiled checkpoint cannot store what it finds.
            for name in within:
                if name in self.specs and not self.specs[name].positions.everywhere:
                    self.state.context.indices(name)
            output = call_with_context(base_layer, self.state, *args, **kwargs)
        else:
            output = base_layer(*args, **kwargs)
        return self._edit_output(_OUTPUT, self, args, output)

    def _adapters(self) -> list[str]:
        """Return the adapters of this forward: the active ones, or its rows'."""
        if self._disable_adapters:
            return []
        context = self.state.thread.context
        # A list since set_adapter; PEFT's property makes two more calls.
        names = cast("list[str]", self._active_adapter)
        if context is not None and context.row_adapters is not None:
            names = [n for n in dict.fromkeys(context.row_adapters) if n != BASE]
        return self.state.with_strength(names)

    def _edit_input(
        self, site: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any
    ) -> tuple[Any, Any]:
        if args:
            return (self._edit(args[0], site), *args[1:]), kwargs
        name = "hidden_states"
        if name not in kwargs:  # such as "x"
            target = self.base_layer if module is self else module
            name = next(iter(inspect.signature(target.forward).parameters))
        return args, kwargs | {name: self._edit(kwargs.get(name), site)}

    def _edit_output(self, site: str, module: nn.Module, args: Any, output: Any) -> Any:
        h = hidden_states_of(output)
        edited = self._edit(h, site)
        if edited is h:
            return output
        edited_outputs = self.state.context.edited_outputs
        if site == _OUTPUT and edited_outputs is not None:
            edited_outputs[id(h)] = h, edited
        return with_hidden_states(output, edited)

    def _edit(self, h: Any, site: str) -> Any:
        """Return hidden states edited by each adapter of this site, in turn."""
        for name in self._adapters():
            if self.sites.get(name) != site:
                continue
            context, put_back = self.state.context, None
            everywhere = self.specs[name].positions.everywhere
            indices = None if everywhere else context.indices(name)
            if indices is None and not everywhere:
                continue
            shape = (*context.shape, self.sizes[name])
            is_transposed = self.state.layout is Layout.TIME_FIRST
            if is_transposed or not isinstance(h, Tensor) or h.shape != shape:
                all_vectors = everywhere and context.row_adapters is None
                h, put_back = self._token_vectors(h, shape, site, all_vectors)
            if everywhere:
                indices = context.row_tokens(name, h.device)
            edit, unedited = None, h
            # A layer that is compiled alone makes its own edit, in its graph.
            if context.is_compiled or not is_compiling():
                edit = context.prepared.pop((self, site, name), None)
            if edit is not None:
                h = edit(h, indices)
            else:
                h = edit_hidden_states(h, indices, self.interventions(name))
            h = at_strength(self.state.strength(name), unedited, h)
            if put_back is not None:
                h = put_back(h)
        return h

    def _token_vectors(
        self, h: Any, shape: tuple[int, int, int], site: str, all_vectors: bool
    ) -> TokenVectors:
        """Return the vectors of the batch's tokens, or all vectors inside of experts;
        RuntimeError where they cannot be told."""
        inside = is_inside_experts(self.base_layer, site.rpartition(".")[0])
        if inside and all_vectors and h.shape[-1] == shape[-1]:
            return TokenVectors(h, lambda new: new)
        found = None if inside else token_vectors(h, shape, self.state.layout)
        if found is None:
            layer = type(self.base_layer).__name__
            raise RuntimeError(not_told(h, shape, f"{site.strip('.')} of {layer}"))
        return found

    def outer_edits(self) -> Iterator[tuple[str, str, list[Intervention]]]:
        """Yield site, adapter and interventions of this forward's edits around the
        layer; checkpointing would replay those within."""
        for name in self._adapters():
            if (site := self.sites.get(name)) in (_INPUT, _OUTPUT):
                yield site, name, self.interventions(name)

    def interventions(self, name: str) -> list[Intervention]:
        """Return an adapter's interventions: one, or one each for prefix and suffix."""
        sides: Any = self._modules["intv_0"], self._modules["intv_1"]
        return [side._modules[name] for side in sides if name in side._modules]

    def _add_lora(
        self, path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        context, total = self.state.thread.context, output
        for name in self._adapters():
            lora = self.intv_lora[name] if name in self.intv_lora else None
            if not isinstance(lora, LayerLora) or path not in lora.paths:
                continue
            strength = self.state.strength(name)
            if context is None or context.row_adapters is None:
                total = lora.add_to(total, path, args[0], None, strength)
                continue
            rows = context.row_tokens(name, total.device)
            x_BTD, y_BTD = (
                self._token_vectors(h, (*context.shape, h.shape[-1]), path, False)
                for h in (args[0], total)
            )
            added_BTD = lora.add_to(y_BTD.h_BTD, path, x_BTD.h_BTD, rows, strength)
            total = y_BTD.put_back(added_BTD)
        return total.to(output.dtype)


class FoundIntervention(NamedTuple):
    """An intervention and its place: side 1 is the untied suffix's."""

    layer: int
    side: int
    wrapper: LoreftDecoderLayer
    intervention: Intervention


def interventions_of(model: nn.Module, adapter: str) -> Iterator[FoundIntervention]:
    """Yield every intervention of an adapter, in the order of the layers."""
    for path, module in model.named_modules():
        if isinstance(module, LoreftDecoderLayer):
            number = int(path.rpartition(".")[2])
            for side, intervention in enumerate(module.interventions(adapter)):
                yield FoundIntervention(number, side, module, intervention)


def _device_of(module: nn.Module) -> torch.device:
    devices = (p.device for p in module.parameters() if not p.is_meta)
    return next(devices, torch.device("cpu"))
