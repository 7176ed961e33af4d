"""The PEFT tuner: finds the decoder layers, wraps them, and keeps the hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import _insert_adapter_name_into_state_dict
from torch import Tensor, nn

from axolotl_reft.core.tensors import check_complete
from axolotl_reft.settings.components import check_list_of_layers
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.context import BASE, repeat_names
from axolotl_reft.tuner.hooks import ModelHooks
from axolotl_reft.tuner.input_gradients import (
    keep_from_packing,
    spare_frozen_layers,
    treat_as_usual,
)
from axolotl_reft.tuner.layer import LoreftDecoderLayer, cannot_merge
from axolotl_reft.tuner.trained_modules import (
    check_modules_to_save,
    fit_vocabulary,
    tie_trained_embeddings,
)

_HOOKS = "loreft_hooks"
# What PEFT and this package put into the paths of parameters.
_PARTS = {BASE, "base_model", "model", "base_layer", "modules_to_save"}
_PARTS |= {"original_module", *LoreftDecoderLayer.adapter_layer_names}
_PARTS |= {"rotation", "rotation_base", "weight", "bias", "proj_weight"}


class LoreftModel(BaseTuner):
    """LoReFT on a decoder-only transformers model (arXiv 2404.03592).

    Built by ``peft.get_peft_model(model, LoreftConfig(...))``.

    Raises:
        ValueError: the model's layers cannot be found, a layer or the rank is out of
            range, or merging is asked for.
    """

    # In no name below: "ref" and "default" are other adapters' names, and PEFT matches
    # by substring (so not "prefix" either).
    prefix = "intv_"
    tuner_layer_cls = LoreftDecoderLayer
    target_module_mapping: dict[str, list[str]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for name in ("intervention_locations", "unit_locations"):
            if name in kwargs:
                raise ValueError(
                    f"{name}: positions are found in every batch, and others cannot be "
                    "passed; leave it out, and choose with LoreftConfig(positions=...)"
                )
        # As PEFT's forward hands them down; transformers takes such a None for another
        # answer than the config's, and carries it through every layer.
        for name in ("output_attentions", "output_hidden_states", "return_dict"):
            if name in kwargs and kwargs[name] is None:
                del kwargs[name]
        # By __call__ where PEFT uses .forward, so that the hooks see labels.
        return self.model(*args, **kwargs)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        hooks = hooks_of(self.model)
        # PEFT finds an adapter's tensors by ``.name.`` in their paths.
        parts = {
            part for path, _ in model.named_parameters() for part in path.split(".")
        }
        taken = _PARTS | parts - set(hooks.state.adapters if hooks else ())
        is_attribute = hasattr(nn.ModuleDict(), adapter_name)
        if (
            not adapter_name
            or "." in adapter_name
            or adapter_name in taken
            or is_attribute
        ):
            raise ValueError(
                f"adapter_name: {adapter_name!r} cannot be an adapter's name: PEFT or "
                "torch would take it for something else; choose another, such as "
                "'default'"
            )
        # PEFT adds to an adapter of the same name; here it is replaced.
        for layer in hooks.state.layers if hooks else ():
            layer.forget_adapter(adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Edit each row of a batch by its adapter: PEFT's way to ``adapter_names``."""
        names, hooks = kwargs.get("adapter_names"), hooks_of(self.model)
        if names is None or hooks is None:
            yield
            return
        self._check_adapter_names(names)
        handles = [
            module.register_forward_pre_hook(
                partial(_add_adapter_names, hooks), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
        ]
        thread = hooks.state.thread
        thread.adapter_names = names
        try:
            yield
        finally:
            thread.adapter_names = None
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, names: Any) -> None:
        if not isinstance(names, (list, tuple)):
            raise TypeError(
                f"Got adapter names of type {type(names)}, expected a list of str."
            )
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode."
            )
        named = {name for name in names if name != BASE}
        if unknown := named - self.peft_config.keys():
            raise ValueError(
                "Trying to infer with non-existing adapter(s): "
                f"{', '.join(sorted(map(str, unknown)))}; there are "
                f"{', '.join(self.peft_config)}, and {BASE} for none"
            )
        used = named.union(self.active_adapters)
        for path, module in self.model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                without = used - module._adapters
                if without and without != used:
                    raise ValueError(
                        f"adapter_names: {sorted(without)[0]!r} has no {path} of its "
                        "own (modules_to_save) and others have; PEFT cannot mix them "
                        "in one batch, so run them one after the other"
                    )

    # PEFT 0.21 finds an adapter's tensors by module, so that those it has no place for
    # would be passed over and not be refused; 0.20 goes by the prefix, as here.

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
        """Refused.

        Raises:
            ValueError: always.
        """
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
        edited = peft_config.spec().ranks(len(layers))
        numbers = edited if peft_config.lora is None else range(len(layers))
        peft_config.target_modules = {f"{path}.{number}" for number in numbers}
        check_modules_to_save(peft_config, self.model, path)
        return peft_config

    def _check_tied_modules(self, model: nn.Module, peft_config: LoreftConfig) -> None:
        # PEFT's warns that each gets a copy of its own.
        tied = self._get_module_names_tied_with_embedding()
        tie_trained_embeddings(peft_config, self.model, tied)

    def _prepare_model(self, peft_config: LoreftConfig, model: Any) -> None:
        fit_vocabulary(peft_config, model)
        if not peft_config.inference_mode:
            keep_from_packing(model)
        if hooks_of(model) is None:
            # A plain attribute, of the model and not of this tuner: see hooks.py.
            model.__dict__[_HOOKS] = ModelHooks(model, model.base_model)
            spare_frozen_layers(model, self.prefix)

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
            target = LoreftDecoderLayer(target, state, _text_config(self.model))
            setattr(parent, target_name, target)
        rank = peft_config.spec().ranks(len(parent)).get(int(target_name))
        target.update_layer(adapter_name, peft_config, rank)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, *_: Any
    ) -> None:
        # PEFT's copies a `weight`, which a decoder layer has not.
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(
        self, merge: bool = True, **kwargs: Any
    ) -> nn.Module:
        if merge:
            raise cannot_merge()
        hooks = hooks_of(self.model)
        if hooks is not None:
            for layer in hooks.state.layers:
                layer.detach()
            hooks.detach()
            del self.model.__dict__[_HOOKS]
            treat_as_usual(self.model)
        return super()._unload_and_optionally_merge(merge=False, **kwargs)


def _add_adapter_names(
    hooks: ModelHooks, module: nn.Module, args: Any, kwargs: Any
) -> tuple[Any, Any]:
    names = hooks.state.thread.adapter_names
    if names is None:  # of another thread's batch
        return args, kwargs
    # ``generate`` has several rows for each, whoever asked for its beams.
    return args, kwargs | {"adapter_names": repeat_names(names, args[0].shape[0])}


def hooks_of(model: nn.Module) -> ModelHooks | None:
    return model.__dict__.get(_HOOKS)


def _text_config(model: Any) -> Any:
    """The language model's config, also of one that is part of a larger model."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of a transformers model's decoder layers.

    It is the outermost ``nn.ModuleList`` with as many entries as the model's own config
    counts hidden layers, so that no table of architectures is needed.

    Raises:
        ValueError: not a transformers model, an encoder-decoder, or no such list.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "base_model"):
        raise ValueError(
            f"LoReFT needs a transformers model, and got a {type(model).__name__}; "
            "load it with transformers' AutoModelForCausalLM"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"LoReFT edits models of one stack of layers, and {type(model).__name__} "
            "is an encoder-decoder; use a causal language model or an encoder"
        )
    count = _text_config(model).num_hidden_layers
    lists = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ValueError(
            f"LoReFT found no list of {count} layers in {type(model).__name__}; its "
            "architecture is not supported"
        )
    _, path, layers = min(lists, key=lambda found: found[:2])
    return path, layers
