"""The PEFT tuner: finds the decoder layers, wraps them, and keeps the hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.save_and_load import _insert_adapter_name_into_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from axolotl_reft.core.tensors import check_complete
from axolotl_reft.settings.components import check_list_of_layers
from axolotl_reft.settings.strength import read_strength
from axolotl_reft.tuner import trained_modules
from axolotl_reft.tuner.base_model import check_base_model, free_name
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.context import BASE
from axolotl_reft.tuner.hooks import ModelHooks
from axolotl_reft.tuner.layer import LoreftDecoderLayer
from axolotl_reft.tuner.row_adapters import adapters_by_row

_HOOKS = "loreft_hooks"
_BNB_PACKS_ON_CPU = "support_avx512bf16_for_cpu"
# What PEFT and this package put into the paths of parameters.
_PARTS = {BASE, "base_model", "model", "base_layer", "modules_to_save"}
_PARTS |= {"original_module", *LoreftDecoderLayer.adapter_layer_names}
_PARTS |= {"rotation", "rotation_base", "weight", "bias", "proj_weight"}

# Of the lists of layers in transformers.
_NAMES_OF_LAYERS = ("layers", "layer", "h", "blocks")


class LoreftModel(BaseTuner):
    """LoReFT on a transformers model with one stack of layers (arXiv 2404.03592), by
    ``peft.get_peft_model(model, LoreftConfig(...))``.

    Raises:
        ValueError: the model's layers cannot be found, a layer or the rank is out of
            range, or merging is asked for.
    """

    # PEFT matches names by substring, so no "ref", "prefix" or "default" in it.
    prefix = "intv_"
    tuner_layer_cls = LoreftDecoderLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        check_base_model(model)
        super().__init__(model, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for name in ("intervention_locations", "unit_locations"):
            if name in kwargs:
                raise ValueError(
                    f"{name}: positions are found in every batch and cannot be passed; "
                    "leave it out, and choose with LoreftConfig(positions=...)"
                )
        # PEFT's forward hands down None, which transformers takes for a no.
        for name in ("output_attentions", "output_hidden_states", "return_dict"):
            if name in kwargs and kwargs[name] is None:
                del kwargs[name]
        # Not .forward, as PEFT has it: the hooks must see the labels.
        return self.model(*args, **kwargs)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        hooks = hooks_of(self.model)
        # PEFT finds an adapter's tensors by ``.name.`` in their paths.
        parts = {part for p, _ in model.named_parameters() for part in p.split(".")}
        taken = _PARTS | parts - set(hooks.state.adapters if hooks else ())
        taken |= {"", *dir(nn.ModuleDict())}
        if adapter_name in taken or "." in adapter_name:
            raise ValueError(
                f"adapter_name: {adapter_name!r} cannot be an adapter's name: PEFT or "
                "torch would take it for something else; choose another, such as "
                f"{free_name(taken)!r}"
            )
        # PEFT adds to an adapter of the same name; here it is replaced.
        for layer in hooks.state.layers if hooks else ():
            layer.forget_adapter(adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Edit each row of a batch by its adapter: PEFT's way to ``adapter_names``."""
        entries, hooks = kwargs.get("adapter_names"), hooks_of(self.model)
        if entries is None or hooks is None:
            yield
            return
        with adapters_by_row(self, hooks.state, entries):
            yield

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength α of an adapter, as PEFT's LoRA layers do: edits become h +
        α(Φ(h) − h), and LoRA beside them α times what it is.

        1 is the adapter, 0 the model without it (but for ``modules_to_save``), exactly.
        Of the live model, and not saved. ``ValueError`` for an adapter that is not
        there, and for a strength that is not a finite number.
        """
        if adapter not in self.peft_config:
            raise ValueError(
                f"set_scale: there is no adapter {adapter!r}, only "
                f"{', '.join(self.peft_config)}"
            )
        self.model.__dict__[_HOOKS].state.set_strength(
            adapter, read_strength(scale, f"set_scale: the strength of {adapter!r}")
        )

    # PEFT 0.21 finds an adapter's tensors by module, and passes over those it has no
    # place for, which must be refused; 0.20 goes by the prefix, as here.

    @classmethod
    def _get_adapter_state_dict(
        cls, *, state_dict: dict[str, Tensor], **_: Any
    ) -> dict[str, Tensor]:
        return {key: state_dict[key] for key in state_dict if cls.prefix in key}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, *, adapter_name: str, state_dict: dict[str, Tensor], **_: Any
    ) -> dict[str, Tensor]:
        return _insert_adapter_name_into_state_dict(
            state_dict, adapter_name=adapter_name, parameter_prefix=cls.prefix
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        tensors = chain(self.named_parameters(), self.named_buffers())
        check_complete(state_dict, [prefix + name for name, _ in tensors])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "add_weighted_adapter: LoReFT adapters cannot be added up: a weighted sum "
            "of rotations is not a rotation. base_model.set_adapter([first, second]) "
            "applies several, one after the other"
        )

    def _prepare_adapter_config(
        self, peft_config: LoreftConfig, model_config: dict[str, Any]
    ) -> LoreftConfig:
        path, layers = find_decoder_layers(self.model)
        check_list_of_layers(peft_config.component, path)
        self._spec = peft_config.spec()  # of the adapter that is being made
        self._ranks = self._spec.ranks(len(layers))
        numbers = self._ranks if peft_config.lora is None else range(len(layers))
        peft_config.target_modules = {f"{path}.{number}" for number in numbers}
        trained_modules.check_modules_to_save(peft_config, self.model, path)
        return peft_config

    def _check_tied_modules(self, model: nn.Module, peft_config: LoreftConfig) -> None:
        if not peft_config.modules_to_save:
            return  # some models name no embeddings, and would raise
        # PEFT's warns that each gets a copy of its own.
        tied = self._get_module_names_tied_with_embedding()
        trained_modules.tie_trained_embeddings(peft_config, self.model, tied)

    def _prepare_model(self, peft_config: LoreftConfig, model: PreTrainedModel) -> None:
        trained_modules.fit_vocabulary(peft_config, model)
        if not peft_config.inference_mode:
            disable_cpu_packing(model)
        if hooks_of(model) is None:
            # A plain attribute, of the model and not of this tuner: see hooks.py.
            layers, _ = find_decoder_layers(model)
            model.__dict__[_HOOKS] = ModelHooks(model, layers, self.prefix)

    @staticmethod
    def _check_target_module_exists(peft_config: LoreftConfig, key: str) -> bool:
        return key in (peft_config.target_modules or ())

    def _create_and_replace(
        self,
        peft_config: LoreftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.ModuleList,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if not isinstance(target, LoreftDecoderLayer):
            state = self.model.__dict__[_HOOKS].state
            text_config = self.model.config.get_text_config()
            target = LoreftDecoderLayer(target, state, text_config)
            setattr(parent, target_name, target)
        rank = self._ranks.get(int(target_name))
        target.update_layer(adapter_name, peft_config, self._spec, rank)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, *_: Any
    ) -> None:
        # PEFT's copies a `weight`, which a decoder layer has not.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "a LoReFT adapter cannot be merged into the base model: no change of the "
            "weights edits hidden states at some positions. Ship the adapter beside "
            "the base, and load it with PeftModel.from_pretrained after import "
            "axolotl_reft; unload() gives back the base model"
        )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        if hooks := hooks_of(model):
            for layer in hooks.state.layers:
                layer.detach()
            hooks.detach()
            del model.__dict__[_HOOKS]
        return model


def disable_cpu_packing(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing the weights of a base that is trained through.

    On a CPU with instructions for bfloat16 it (0.50) packs 4-bit weights at the first
    evaluation, for a kernel without a backward, which it takes in training ever after.
    ValueError if it has packed weights already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, _BNB_PACKS_ON_CPU):
            continue
        # Patch: bitsandbytes has no setting for this.
        setattr(module, _BNB_PACKS_ON_CPU, False)
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name} of the base was packed by bitsandbytes when it was evaluated, "
                "for a kernel without gradients; load the base anew, and make the "
                "adapter before anything is computed"
            )


def hooks_of(model: nn.Module) -> ModelHooks | None:
    return model.__dict__.get(_HOOKS)


def find_decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of a transformers model's decoder layers.

    It is a ``nn.ModuleList`` with as many entries as the config of the text model
    counts hidden layers, in a model with that config, so that no table of architectures
    is needed, and no tower of another modality is taken.

    Raises:
        ValueError: an encoder-decoder, or no such list.
    """
    config: Any = model.config
    name = type(model).__name__
    text_config = config.get_text_config()
    count = getattr(text_config, "num_hidden_layers", None)
    # The decoder of an encoder-decoder as a model of its own keeps the whole's config.
    count = getattr(text_config, "decoder_layers", count)
    if getattr(text_config, "is_decoder", False):
        count = getattr(text_config, "num_decoder_layers", count)
    lists = list(_lists_of_modules(model, "", config, count))
    kind = type(text_config)
    texts = [f.path for f in lists if type(f.config.get_text_config()) is kind]
    parts = {part for path in texts for part in path.split(".")}
    # Some are encoder-decoders without saying so in the config.
    if getattr(config, "is_encoder_decoder", False) or parts >= {"encoder", "decoder"}:
        raise ValueError(
            f"LoReFT edits models of one stack of layers, and {name} is an "
            "encoder-decoder; use a causal language model or an encoder"
        )
    for is_text in (lambda c: c is text_config, lambda c: type(c) is kind):
        of_text = [found for found in lists if is_text(found.config)]
        if of_text:
            lists = of_text
            break
    best = min((found.rank for found in lists), default=None)
    lists = [found for found in lists if found.rank == best]
    if len(lists) != 1:
        several = f", but {', '.join(found.path for found in lists)}" if lists else ""
        raise ValueError(
            f"LoReFT found no list of {count} layers in {name}{several}, and does not "
            "support it; use a model that is built of decoder layers"
        )
    return lists[0].path, lists[0].modules


class _ListOfModules(NamedTuple):
    path: str
    modules: nn.ModuleList
    config: Any  # of the transformers model that holds it

    @property
    def rank(self) -> tuple[bool, int, bool]:
        """Sort by how sure it is that these are decoder layers."""
        parents, _, name = self.path.rpartition(".")
        layer = self.modules[0]
        layer = getattr(layer, "base_layer", layer)
        is_layer = isinstance(layer, GradientCheckpointingLayer)
        return not is_layer, parents.count("."), name not in _NAMES_OF_LAYERS


def _lists_of_modules(
    module: nn.Module, path: str, config: Any, count: int | None
) -> Iterator[_ListOfModules]:
    """Yield the lists of so many modules, but none within a list: those are experts."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if not isinstance(child, nn.ModuleList):
            inner = child.config if isinstance(child, PreTrainedModel) else config
            yield from _lists_of_modules(child, child_path, inner, count)
        elif len(child) == count:
            yield _ListOfModules(child_path, child, config)
