"""The plugin's hooks, in the order in which axolotl calls them."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import MutableMapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from axolotl.cli.config import API_KEY_FIELDS
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.distributed import is_local_main_process
from axolotl.utils.fp32_norms import get_fp32_norm_patterns
from axolotl.utils.logging import get_logger
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.plugin import quantised, running
from axolotl_reft.plugin.against_base import check_against_base
from axolotl_reft.plugin.args import (
    adapter_settings,
    check_as_written,
    move_into_block,
)
from axolotl_reft.plugin.checkpointing import keep_shared_keys_and_values
from axolotl_reft.plugin.labels import complete_batches
from axolotl_reft.plugin.packing import warn_of_packing
from axolotl_reft.plugin.prompt_forms import (
    markers_of_data,
    tell_of_sampling,
    warn_of_other_prompts,
)
from axolotl_reft.saved.card import keep_in_trainers_card
from axolotl_reft.training.edit_log import EditLog
from axolotl_reft.training.first_batch import FirstBatch
from axolotl_reft.training.first_edit import FirstEdit
from axolotl_reft.training.frozen_prompt import use_frozen_prompt
from axolotl_reft.training.run_record import RunRecord
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.lora import LayerLora

LOG = get_logger(__name__)


class LoreftPlugin(BasePlugin):
    """``adapter: loreft`` for axolotl."""

    _has_block = True
    _written: dict[str, Any] = {}

    def register(self, cfg: MutableMapping[str, Any]) -> None:
        move_into_block(cfg)
        self._written = deepcopy({k: cfg[k] for k in cfg if k not in API_KEY_FIELDS})
        adapter = cfg.get("adapter")
        self._has_block = bool(cfg.get("loreft"))
        if adapter != "loreft" and str(adapter).lower() in ("loreft", "reft"):
            raise ValueError(f"adapter: {adapter!r} is written adapter: loreft")
        running.check_command(cfg)
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
        inference = running.is_inference()
        if inference:
            cfg.lora_model_dir = cfg.lora_model_dir or trained_adapter(cfg.output_dir)
            LOG.info("using the LoReFT adapter in %s", cfg.lora_model_dir)
            evaluates = running.is_running("axolotl.evaluate")
            if evaluates and not (cfg.val_set_size or cfg.test_datasets):
                LOG.warning(
                    "axolotl evaluate computes the loss of the training data "
                    "(train_loss), and no eval_loss; set val_set_size or test_datasets"
                )
        elif not self._has_block:
            LOG.info(
                "no loreft: block in the config: positions: %s, rank: %s, layers: %s",
                *(cfg.loreft[key] for key in ("positions", "rank", "layers")),
            )
        model_config = load_model_config(cfg)
        check_against_base(cfg, model_config, training=not inference)
        keep_shared_keys_and_values(cfg, model_config)
        quantised.fill_config(cfg)
        # Reentrant checkpointing warns of the frozen layers below the first edit.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")

    def post_model_build(self, cfg: DictDefault, model: PreTrainedModel) -> None:
        if cfg.adapter == "loreft":
            quantised.prepare_base(cfg, model, training=not running.is_inference())
            warn_of_packing(cfg, model)

    def load_adapter(
        self,
        model: PreTrainedModel,
        cfg: DictDefault,
        inference: bool = False,
        config_only: bool = False,
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        if cfg.adapter != "loreft":
            return None
        saved = cfg.lora_model_dir
        if saved:
            config = LoreftConfig.from_pretrained(saved)
            config.inference_mode = inference
        else:
            task = TaskType.SEQ_CLS if cfg.reward_model else TaskType.CAUSAL_LM
            config = LoreftConfig(task_type=task, **adapter_settings(cfg.loreft))
            if task == TaskType.CAUSAL_LM:
                config.turn_markers = markers_of_data(cfg)
        seed = 42 if cfg.seed is None else cfg.seed
        if config_only:
            # TRL makes the adapter next, and sets no seed.
            torch.manual_seed(seed)
            return None, config
        # For modules_to_save alone: interventions are always float32.
        upcast = {
            "autocast_adapter_dtype": cfg.peft_autocast_adapter_dtype is not False
        }
        # Every process must begin with the same parameters.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # no device's
            if saved:
                peft_model = PeftModel.from_pretrained(
                    model, saved, config=config, is_trainable=not inference, **upcast
                )
            else:
                peft_model = get_peft_model(model, config, **upcast)
        if is_local_main_process():
            peft_model.print_trainable_parameters()
        return peft_model, config

    def post_model_load(self, cfg: DictDefault, model: Any) -> None:
        if cfg.adapter != "loreft":
            return
        if running.is_running("axolotl.cli.inference"):
            chat = running.is_running("axolotl.cli.chat")
            warn_of_other_prompts(cfg, chat)
            tell_of_sampling(chat)
        if str(cfg.fsdp_version) == "2":
            # In the model's group its mixed precision would round the adapter at every
            # step. As axolotl's norms, its modules get float32 groups of their own.
            classes = [*INTERVENTION_CLASSES.values(), LayerLora]
            patterns = get_fp32_norm_patterns(cfg) or []
            patterns += [f"{c.__module__}.{c.__name__}" for c in classes]
            if cfg.fp32_norms:
                cfg.fp32_norm_classes = patterns
            # Patch: where axolotl looks for the patterns when fp32_norms is off.
            model._axolotl_fp32_norm_patterns = patterns

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any]:
        """Let a CPU train in bfloat16: unless told that it is meant, transformers takes
        ``bf16`` for a GPU's."""
        return {"use_cpu": True} if cfg.bf16 and str(cfg.device) == "cpu" else {}

    def add_callbacks_post_trainer(
        self, cfg: DictDefault, trainer: Trainer
    ) -> list[TrainerCallback]:
        """Prepare the trainer, in the only hook that evaluation calls as well."""
        if cfg.adapter == "loreft" and cfg.rl:
            from axolotl_reft.plugin.preference import prepare_trainer

            evaluates = running.is_inference()
            prepare_trainer(trainer, cfg.lora_model_dir, evaluates)
            made_by_trl = not evaluates and cfg.rl in ("dpo", "ipo", "kto")
            if made_by_trl and is_local_main_process():
                trainer.model.print_trainable_parameters()
        elif cfg.adapter == "loreft" and not cfg.reward_model:
            complete_batches(trainer, cfg.loreft_labelled_logits)
        if cfg.adapter == "loreft":
            when, cache = cfg.loreft.frozen_prompt, cfg.loreft.frozen_prompt_cache
            use_frozen_prompt(trainer.model, when, cache, _log_once)
        return [RunRecord(self._written), *edit_callbacks(cfg, trainer)]

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        config = getattr(trainer.model, "peft_config", {}).get("default")
        if cfg.adapter == "loreft" and config is not None:
            keep_in_trainers_card(trainer, config)


def trained_adapter(output_dir: str) -> str:
    """Return ``output_dir`` if training left an adapter there, else raise."""
    # By its weights: axolotl writes the configuration already when training begins.
    if (Path(output_dir) / SAFETENSORS_WEIGHTS_NAME).is_file():
        return str(output_dir)
    remedy = "train first with axolotl train, or pass --lora-model-dir"
    if Path(output_dir).is_dir() and (last := get_last_checkpoint(output_dir)):
        remedy = (
            "the training did not finish: continue it with axolotl train "
            f"--auto-resume-from-checkpoints, or pass --lora-model-dir {last}"
        )
    raise ValueError(
        f"output_dir: there is no trained LoReFT adapter in {str(output_dir)!r} "
        f"(no {SAFETENSORS_WEIGHTS_NAME}); {remedy}"
    )


def edit_callbacks(cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
    """Return the trainer's callbacks, none with ``loreft_log_edits: false``."""
    adapted = cfg.adapter == "loreft" and hasattr(trainer.model, "peft_config")
    if not adapted or cfg.loreft_log_edits is False:
        return []
    callbacks: list[TrainerCallback] = [EditLog(trainer)]
    if not cfg.lora_model_dir:
        warn = partial(_log_once, level=logging.WARNING)
        callbacks.append(FirstEdit(trainer.model, _log_once, warn))
    # A processor holds its tokenizer.
    tokenizer = trainer.processing_class
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if hasattr(tokenizer, "decode"):
        callbacks.append(FirstBatch(trainer.model, tokenizer, _log))
    return callbacks


def _log_once(text: str, level: int = logging.INFO) -> None:
    """Log on the first process."""
    if is_local_main_process():
        _log(f"LoReFT: {text}", level)


def _log(text: str, level: int = logging.INFO) -> None:
    """Log on a new line, not behind a progress bar."""
    with tqdm.external_write_mode():
        if not sys.stderr.isatty():
            # In a file the bar cannot be cleared.
            print(file=sys.stderr, flush=True)
        LOG.log(level, "%s", text)
