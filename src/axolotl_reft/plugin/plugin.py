"""The plugin's hooks, in the order in which axolotl calls them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.fp32_norms import get_fp32_norm_patterns
from axolotl.utils.logging import get_logger
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel, TrainerCallback

from axolotl_reft.plugin import quantised
from axolotl_reft.plugin.against_base import check_against_base
from axolotl_reft.plugin.args import check_as_written
from axolotl_reft.plugin.chat import markers_of_data
from axolotl_reft.plugin.labels import complete_batches, show_labels
from axolotl_reft.plugin.observation import edit_callbacks
from axolotl_reft.plugin.refusals import COMMANDS
from axolotl_reft.plugin.rules import refuse
from axolotl_reft.plugin.running import (
    check_overrides,
    is_inference,
    is_running,
    warn_of_no_evaluation,
)
from axolotl_reft.plugin.typed_prompts import warn_of_other_prompts
from axolotl_reft.saved.card import keep_in_trainers_card
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.lora import LayerLora

LOG = get_logger(__name__)

# axolotl gives these trainers the adapter's configuration; TRL makes the adapter.
_ADAPTED_BY_TRL = ("dpo", "ipo", "kto")


class LoreftPlugin(BasePlugin):
    """``adapter: loreft`` for axolotl.

    .. code-block:: yaml

        plugins:
          - axolotl_reft.LoreftPlugin
        adapter: loreft
        loreft:
          layers: all
          positions: f7+l7
          rank: 8
    """

    _has_block = True

    def register(self, cfg: Any) -> None:
        adapter = cfg.get("adapter")
        self._has_block = bool(cfg.get("loreft"))
        if adapter == "loreft":
            refuse(COMMANDS, cfg, None)
        elif str(adapter).lower() in ("loreft", "reft"):
            raise ValueError(f"adapter: {adapter!r} is written adapter: loreft")
        check_overrides()
        check_as_written(cfg)

    def get_input_args(self) -> str:
        return "axolotl_reft.plugin.args.LoreftArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name="loreft")]

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> None:
        """Check the config against the base, before data is tokenized; load none."""
        if cfg.adapter == "loreft":
            check_against_base(cfg, load_model_config(cfg))

    def pre_model_load(self, cfg: DictDefault) -> None:
        if cfg.adapter != "loreft":
            return
        inference = is_inference()
        if inference:
            cfg.lora_model_dir = cfg.lora_model_dir or trained_adapter(cfg.output_dir)
            LOG.info("using the LoReFT adapter in %s", cfg.lora_model_dir)
            warn_of_no_evaluation(cfg)
        elif not self._has_block:
            block = LoreftConfig(**cfg.loreft)
            LOG.info(
                "no loreft: block in the config: positions: %s, rank: %s, layers: %s",
                block.positions,
                block.rank,
                block.layers,
            )
        check_against_base(cfg, load_model_config(cfg), training=not inference)
        quantised.complete(cfg)
        # Reentrant checkpointing warns of the frozen layers below the first edit.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")

    def post_model_build(self, cfg: DictDefault, model: PreTrainedModel) -> None:
        if cfg.adapter == "loreft":
            quantised.finish_base(cfg, model, training=not is_inference())

    def load_adapter(
        self,
        model: PreTrainedModel,
        cfg: DictDefault,
        inference: bool = False,
        config_only: bool = False,
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        if cfg.adapter != "loreft":
            return None
        task = TaskType.SEQ_CLS if cfg.reward_model else TaskType.CAUSAL_LM
        config = LoreftConfig(task_type=task, **cfg.loreft)
        if task == TaskType.CAUSAL_LM and not cfg.lora_model_dir:
            config.turn_markers = markers_of_data(cfg)
        seed = 42 if cfg.seed is None else cfg.seed
        if config_only:
            # TRL makes the adapter next, and sets no seed.
            torch.manual_seed(seed)
            if cfg.lora_model_dir:
                config = LoreftConfig.from_pretrained(cfg.lora_model_dir)
                config.inference_mode = False
            return None, config
        # For modules_to_save alone: interventions are always float32.
        upcast = cfg.peft_autocast_adapter_dtype is not False
        if cfg.lora_model_dir:
            peft_model = PeftModel.from_pretrained(
                model,
                cfg.lora_model_dir,
                is_trainable=not inference,
                autocast_adapter_dtype=upcast,
            )
            config = peft_model.peft_config["default"]
        else:
            # Every process must begin with the same parameters.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                peft_model = get_peft_model(
                    model, config, autocast_adapter_dtype=upcast
                )
        _print_trainable_parameters(peft_model)
        return peft_model, config

    def post_model_load(self, cfg: DictDefault, model: Any) -> None:
        if cfg.adapter != "loreft":
            return
        if is_running("axolotl.cli.inference"):
            warn_of_other_prompts(cfg, chat=is_running("axolotl.cli.chat"))
        if str(cfg.fsdp_version) == "2":
            _keep_in_float32(cfg, model)

    def add_callbacks_post_trainer(
        self, cfg: DictDefault, trainer: Any
    ) -> list[TrainerCallback]:
        """Prepare the trainer, in the only hook that evaluation calls as well."""
        if cfg.adapter == "loreft" and cfg.rl:
            from axolotl_reft.plugin.preference import prepare_trainer

            evaluates = is_inference()
            prepare_trainer(trainer, cfg.lora_model_dir, evaluates)
            if not evaluates and cfg.rl in _ADAPTED_BY_TRL:
                _print_trainable_parameters(trainer.model)
        elif cfg.adapter == "loreft" and not cfg.reward_model:
            complete_batches(trainer, cfg.loreft_labelled_logits)
            show_labels(trainer)
        return edit_callbacks(cfg, trainer)

    def post_trainer_create(self, cfg: DictDefault, trainer: Any) -> None:
        config = getattr(trainer.model, "peft_config", {}).get("default")
        if cfg.adapter == "loreft" and config is not None:
            keep_in_trainers_card(trainer, config)


def _keep_in_float32(cfg: DictDefault, model: Any) -> None:
    """Give the adapter's modules float32 groups of their own under FSDP2.

    In the model's group its mixed precision would round them at every step.
    """
    from axolotl_reft.core.interventions import INTERVENTION_CLASSES

    classes = [*INTERVENTION_CLASSES.values(), LayerLora]
    ours = [f"{c.__module__}.{c.__name__}" for c in classes]
    patterns = (get_fp32_norm_patterns(cfg) or []) + ours
    if cfg.fp32_norms:
        cfg.fp32_norm_classes = patterns  # axolotl reads it again after this
    else:
        # Patch: where axolotl looks for the patterns when fp32_norms is off.
        model._axolotl_fp32_norm_patterns = patterns


def _print_trainable_parameters(model: PeftModel) -> None:
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        model.print_trainable_parameters()


def trained_adapter(output_dir: str) -> str:
    """The adapter that training left in ``output_dir``.

    Raises:
        ValueError: there is none; the message names what there is instead.
    """
    # Its weights: axolotl writes the configuration already when training begins.
    if (Path(output_dir) / SAFETENSORS_WEIGHTS_NAME).is_file():
        return str(output_dir)
    weights = Path(output_dir).glob(f"checkpoint-*/{SAFETENSORS_WEIGHTS_NAME}")
    checkpoints = sorted((w.parent for w in weights), key=lambda p: p.stat().st_mtime)
    remedy = "train first with axolotl train, or name an adapter with --lora-model-dir"
    if checkpoints:
        remedy = (
            "the training did not finish: go on with axolotl train "
            "--auto-resume-from-checkpoints, or use a checkpoint with --lora-model-dir "
            f"{checkpoints[-1]}"
        )
    raise ValueError(
        f"output_dir: there is no trained LoReFT adapter in {str(output_dir)!r} "
        f"(looked for {SAFETENSORS_WEIGHTS_NAME}), and a fresh one would answer at "
        f"random; {remedy}"
    )
