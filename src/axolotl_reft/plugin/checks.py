"""What cannot be right beside ``adapter: loreft``, said before the base model loads."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from axolotl.loaders.tokenizer import load_tokenizer
from axolotl.loaders.utils import get_linear_embedding_layers
from axolotl.utils.logging import get_logger
from axolotl.utils.train import determine_last_checkpoint
from pydantic import BaseModel

from axolotl_reft.plugin.preference_checks import check_preference
from axolotl_reft.plugin.quantised import check_quantised_base
from axolotl_reft.saved.directory import check_adapter_fits
from axolotl_reft.settings.components import as_wide_as_the_model
from axolotl_reft.tuner.config import LoreftConfig
from axolotl_reft.tuner.trained_modules import same_modules

LOG = get_logger(__name__)

# The adapter's own: without those of every PEFT method, and what no YAML sets.
_NO_SETTINGS = (
    "modules_to_save",
    "turn_markers",
    "vocab_size",
    "format_version",
    "axolotl_reft_version",
)
_SETTINGS = [key for key in LoreftConfig.__annotations__ if key not in _NO_SETTINGS]

# Settings that are refused when set (true, non-zero, non-empty), and why.
_REFUSED = {
    "merge_lora": "a LoReFT adapter edits hidden states at some positions of a prompt, "
    "so it cannot be merged into weights; serve the adapter beside the base model",
    "relora": "ReLoRA merges the adapter at every restart, and LoReFT cannot be "
    "merged; remove it",
    "loraplus_lr_ratio": "LoRA+ sets the learning rate of LoRA's B matrices, which "
    "LoReFT has not; remove it and set learning_rate",
    "unfrozen_parameters": "base weights that are unfrozen would not be saved with the "
    "adapter; name whole modules under loreft: modules_to_save, which are trained and "
    "saved with it",
    "lisa_n_layers": "LISA unfreezes layers of the base in turn, which would not be "
    "saved with the adapter; remove lisa_n_layers and lisa_step_interval, and choose "
    "what is edited with loreft: layers",
    "fp8": "it trains the base's matrices in 8-bit floats, and LoReFT trains none of "
    "them; remove it, and set load_in_8bit: true for a smaller base",
    "qat": "it trains weights to be quantised, and LoReFT trains none of the base's; "
    "remove it, and set load_in_4bit: true for a quantised base",
    "optim_target_modules": "it chooses weights of the base to train, and LoReFT "
    "trains none of them; remove it",
    "process_reward_model": "process reward models are not supported with adapter: "
    "loreft; remove it, or train a reward_model",
}
# Optimizers made for the base's matrices: projected gradients, updates in backward.
_REFUSED_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo", "q_galore")
# What makes axolotl resize the embeddings.
_NEW_TOKENS = (
    "tokens",
    "special_tokens",
    "added_tokens_overrides",
    "resize_token_embeddings_to_32x",
    "shrink_embeddings",
)
# lora_* keys that axolotl reads for any adapter.
_ADAPTER_KEYS = ("lora_model_dir", "lora_on_cpu")
# Who is trained to be answered to: their tokens would end the prompt too early.
_PROMPTING_ROLES = ("system", "developer", "user", "human")


def check_settings(settings: Mapping[str, Any], positions: str) -> None:
    """Refuse settings of axolotl that contradict the adapter.

    Args:
        settings: axolotl's config, as written or as validated.
        positions: the adapter's positions.

    Raises:
        ValueError: the setting, what it is, why not, and the remedy.
    """
    for key, reason in _REFUSED.items():
        if value := settings.get(key):
            raise ValueError(f"{key}: {_plain(value)} with adapter: loreft: {reason}")
    if "SpectrumPlugin" in _plugins(settings):
        raise ValueError(
            "plugins: SpectrumPlugin with adapter: loreft: it unfreezes weights of the "
            "base, which would not be saved with the adapter; remove it, and choose "
            "what is edited with loreft: layers"
        )
    _refuse_lora_settings(settings)
    check_preference(settings)
    _refuse_scoring_after_training(settings)
    _refuse_optimizers(settings)
    if (tokens := settings.get("tokens")) and not _own_modules_to_save(settings):
        raise ValueError(
            f"tokens: {tokens} need new embeddings, which are trained and saved only "
            "where they are named; write\nloreft:\n  modules_to_save: [embed_tokens, "
            "lm_head]\nor the names that this base has for them"
        )
    if positions != "all":
        _need_prompts(settings, positions)


def _plugins(settings: Mapping[str, Any]) -> list[str]:
    """The names of the plugins' classes."""
    return [str(plugin).rpartition(".")[2] for plugin in settings.get("plugins") or []]


def _refuse_optimizers(settings: Mapping[str, Any]) -> None:
    optimizer = str(_plain(settings.get("optimizer")))
    if optimizer.startswith(_REFUSED_OPTIMIZERS):
        raise ValueError(
            f"optimizer: {optimizer} with adapter: loreft: it saves memory on the "
            "large matrices of a base, and LoReFT trains none of them; set optimizer: "
            "adamw_torch_fused"
        )
    for key in ("embedding_lr", "embedding_lr_scale"):
        if settings.get(key) and not _own_modules_to_save(settings):
            raise ValueError(
                f"{key}: {settings[key]} would do nothing: no embeddings are trained; "
                "remove it, or train them with loreft: modules_to_save: [embed_tokens, "
                "lm_head]"
            )


def _own_modules_to_save(settings: Mapping[str, Any]) -> Any:
    block = settings.get("loreft")
    return dict(block).get("modules_to_save") if block else None


def _refuse_lora_settings(settings: Mapping[str, Any]) -> None:
    own = _own_modules_to_save(settings)
    left = []
    for key, value in settings.items():
        if not value or key in (*_ADAPTER_KEYS, "peft_autocast_adapter_dtype"):
            continue
        if key == "lora_modules_to_save":
            # Where axolotl looks for them; ours are put there in validation.
            if value == own:
                continue
            raise ValueError(
                f"{key}: {value} is a setting of LoRA; with adapter: loreft write it "
                f"into the block\nloreft:\n  modules_to_save: {value}"
            )
        if str(key).startswith(("lora_", "peft_")) or key == "peft":
            left.append(f"{key}: {_plain(value)}")
    if left:
        one = len(left) == 1
        raise ValueError(
            f"{', '.join(left)} {'is a setting' if one else 'are settings'} of LoRA "
            "and would do nothing with adapter: loreft; remove "
            f"{'it' if one else 'them'}. LoReFT's rank, layers and dropout are set in "
            "the loreft: block, and LoRA beside LoReFT under lora: in it"
        )


def check_component(settings: Mapping[str, Any], component: str) -> None:
    """Refuse to edit within an MLP that is computed in pieces or by one kernel.

    Raises:
        ValueError: ``tiled_mlp`` or ``liger_glu_activation`` with such a component.
    """
    within = component == "mlp_activation" or re.search(r"\bmlp\.\w+\.", component)
    if settings.get("tiled_mlp") and within:
        raise ValueError(
            f"tiled_mlp: true with component: {component}: it would see pieces of a "
            "sequence and not know where the prompt is; remove it, or edit mlp_input "
            "or mlp_output"
        )
    fused = settings.get("liger_glu_activation") or settings.get("liger_swiglu")
    if fused and (component == "mlp_activation" or ".act_fn." in component):
        raise ValueError(
            f"liger_glu_activation: true with component: {component}: Liger's kernel "
            "computes the activation and its product in one, and there is nothing to "
            "edit in between; remove liger_glu_activation, or edit "
            "mlp.down_proj.input, which is the product"
        )


def _refuse_scoring_after_training(settings: Mapping[str, Any]) -> None:
    """axolotl's LMEvalPlugin, which would fail when the training is over."""
    scores = settings.get("lm_eval_tasks") and any(
        str(name).endswith(".LMEvalPlugin") for name in settings.get("plugins") or ()
    )
    if scores and settings.get("lm_eval_post_train") is not False:
        raise ValueError(
            "lm_eval_post_train: true (also when left out) with adapter: loreft: "
            "lm_eval's own model cannot load the adapter; set lm_eval_post_train: "
            "false, and after the training run axolotl reft lm-eval config.yml"
        )


def _need_prompts(settings: Mapping[str, Any], positions: str) -> None:
    """With prompt positions, every sample must have a prompt that is not trained."""
    remedy = "or edit every token with positions: all"
    if settings.get("train_on_inputs"):
        raise ValueError(
            f"train_on_inputs: true with positions: {positions}: LoReFT takes the "
            "tokens before the first trained one for the prompt, and here there would "
            f"be none; set train_on_inputs: false, {remedy}"
        )
    if settings.get("pretraining_dataset"):
        raise ValueError(
            f"pretraining_dataset with positions: {positions}: raw text has no prompt "
            f"to edit; use instruction data under datasets, {remedy}"
        )
    for name in ("datasets", "test_datasets"):
        for dataset in _datasets(settings, name):
            kind = dataset.get("type")
            if isinstance(kind, str) and kind.split(".")[0].split(":")[0] in (
                "completion",
                "pretrain",
            ):
                raise ValueError(
                    f"{name}: type: {kind} with positions: {positions}: raw text has "
                    f"no prompt to edit; use instruction data, {remedy}"
                )
            _need_trained_answers(name, dataset, positions)
    if "DiffusionPlugin" in _plugins(settings):
        raise ValueError(
            f"plugins: DiffusionPlugin with positions: {positions}: a diffusion "
            "language model has no prompt that comes before its answer; remove it, "
            f"{remedy}"
        )


def _datasets(settings: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Those that are mappings; of all else axolotl's own validation speaks."""
    given = settings.get(name)
    if not isinstance(given, list):
        return []
    return [
        dict(dataset) for dataset in given if isinstance(dataset, Mapping | BaseModel)
    ]


def _need_trained_answers(name: str, dataset: dict[str, Any], positions: str) -> None:
    """Inference takes a prompt to be all before the answer, so training must too."""
    for key in ("train_on_eos", "train_on_eot"):
        if dataset.get(key) == "all":
            raise ValueError(
                f"{name}: {key}: all with positions: {positions}: the prompt would end "
                f"at the end of the user's turn, and not where the answer begins; "
                f"write {key}: turn, or edit every token with positions: all"
            )
    for role in dataset.get("roles_to_train") or []:
        if role in _PROMPTING_ROLES:
            raise ValueError(
                f"{name}: roles_to_train: {role!r} with positions: {positions}: its "
                "tokens are the prompt, which ends before the first trained token; "
                "leave it out, or edit every token with positions: all"
            )


def _plain(value: Any) -> Any:
    """A value as YAML would show it."""
    if isinstance(value, bool):
        return str(value).lower()
    return getattr(value, "value", value)


def check_against_base(cfg: Any, model_config: Any, training: bool = True) -> None:
    """Check layers, rank and saved adapters against the base model's config.

    Args:
        cfg: axolotl's config.
        model_config: the base's transformers config.
        training: False where a trained adapter answers: then its own settings hold,
            and those of the config that differ are only named.

    Raises:
        ValueError: a layer or the rank is out of range, or the adapter to start or to
            resume from is missing, of another method, of another base, or trained with
            other settings than the config's.
    """
    text_config = model_config.get_text_config()
    hidden_size, count = text_config.hidden_size, text_config.num_hidden_layers
    block = LoreftConfig(**cfg.loreft)
    check_quantised_base(cfg, model_config, training)
    if training:
        _check_vocabulary(cfg, block, model_config)
    rank = max(block.spec().ranks(count).values())
    if as_wide_as_the_model(block.component) and rank > hidden_size:
        raise ValueError(
            f"rank: {rank} is larger than the base model's hidden size "
            f"{hidden_size}; choose a rank of at most {hidden_size}, 4 to 8 are usual"
        )
    embeddings = get_linear_embedding_layers(model_config.model_type)
    tied = embeddings if getattr(text_config, "tie_word_embeddings", False) else []
    for setting, directory in _saved_adapters(cfg, training):
        saved = check_adapter_fits(directory, setting, hidden_size, count)
        compared = list(_SETTINGS)
        if not same_modules(saved.modules_to_save, block.modules_to_save, tied):
            compared.append("modules_to_save")
        differences = [
            f"{key}: {_plain(getattr(saved, key))} (here {_plain(value)})"
            for key in compared
            if getattr(saved, key) != (value := getattr(block, key))
        ]
        if not differences:
            continue
        told = f"{setting}: the adapter in {directory!r} has {', '.join(differences)}"
        if training:
            raise ValueError(
                f"{told}; write the same in the loreft: block, or leave out {setting} "
                "to train a new adapter"
            )
        LOG.warning("%s; the adapter's own settings are used", told)


def _check_vocabulary(cfg: Any, block: LoreftConfig, model_config: Any) -> None:
    """New tokens get new embeddings, which exist only where they are saved."""
    if not any(cfg[key] for key in _NEW_TOKENS):
        return
    rows = model_config.get_text_config().vocab_size
    tokens = len(load_tokenizer(cfg))
    if cfg.resize_token_embeddings_to_32x:
        tokens = math.ceil(tokens / 32) * 32
    changed = tokens > rows or (tokens < rows and cfg.shrink_embeddings)
    embeddings = get_linear_embedding_layers(model_config.model_type)
    if changed and not set(embeddings) <= set(block.modules_to_save or ()):
        raise ValueError(
            f"the tokenizer has {tokens} tokens and the base model's embeddings "
            f"{rows} rows: axolotl resizes them, and the new rows would be lost with "
            f"the base; write loreft: modules_to_save: [{', '.join(embeddings)}]"
        )


def _saved_adapters(cfg: Any, training: bool) -> list[tuple[str, str]]:
    """The settings that name a saved adapter, with what they name."""
    named = {"lora_model_dir": cfg.lora_model_dir}
    if training:
        named["resume_from_checkpoint"] = cfg.resume_from_checkpoint
        if cfg.auto_resume_from_checkpoints and not cfg.resume_from_checkpoint:
            last = determine_last_checkpoint(cfg, update=False)
            named["auto_resume_from_checkpoints"] = last
    return [(setting, str(value)) for setting, value in named.items() if value]
