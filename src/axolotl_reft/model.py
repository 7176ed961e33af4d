"""The PEFT tuner: finds the decoder layers, wraps them, and keeps the tracker."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from axolotl_reft.config import LoreftConfig, layer_ranks
from axolotl_reft.layer import LoreftDecoderLayer, cannot_merge
from axolotl_reft.prompts import PromptTracker

_TRACKER = "loreft_tracker"


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
        # By __call__ where PEFT uses .forward, so that the tracker's hook sees labels.
        return self.model(*args, **kwargs)

    def _prepare_adapter_config(
        self, peft_config: LoreftConfig, model_config: dict[str, Any]
    ) -> LoreftConfig:
        path, layers = find_decoder_layers(self.model)
        ranks = layer_ranks(peft_config, len(layers))
        peft_config.target_modules = {f"{path}.{number}" for number in ranks}
        return peft_config

    def _prepare_model(self, peft_config: LoreftConfig, model: Any) -> None:
        if _tracker_of(model) is None:
            # A plain attribute, of the model and not of this tuner: see prompts.py.
            model.__dict__[_TRACKER] = PromptTracker(model, model.base_model)

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
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ranks = layer_ranks(peft_config, len(parent))
        rank = ranks[int(target_name)]
        if isinstance(target, LoreftDecoderLayer):
            target.update_layer(adapter_name, peft_config, rank)
            return
        tracker = _tracker_of(self.model)
        assert tracker is not None, "_prepare_model comes first"
        wrapper = LoreftDecoderLayer(target, tracker, _text_config(self.model))
        wrapper.training = target.training
        wrapper.update_layer(adapter_name, peft_config, rank)
        setattr(parent, target_name, wrapper)

    def _replace_module(
        self,
        parent: nn.Module,
        child_name: str,
        new_module: nn.Module,
        child: nn.Module,
    ) -> None:
        # PEFT's copies a `weight`, which a decoder layer has not.
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(
        self, merge: bool = True, **kwargs: Any
    ) -> nn.Module:
        if merge:
            raise cannot_merge()
        for module in self.model.modules():
            if isinstance(module, LoreftDecoderLayer):
                module.detach()
        model = super()._unload_and_optionally_merge(merge=False, **kwargs)
        tracker = _tracker_of(model)
        if tracker is not None:
            tracker.detach()
            del model.__dict__[_TRACKER]
        return model


def _tracker_of(model: nn.Module) -> PromptTracker | None:
    return model.__dict__.get(_TRACKER)


def _text_config(model: Any) -> Any:
    """The language model's config, also of one that is part of a larger model."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of a transformers model's decoder layers.

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
