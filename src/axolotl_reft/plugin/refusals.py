"""Settings that contradict ``adapter: loreft``, by topic, as tables for ``rules``.

Those of quantised bases are in ``quantised.py``; what needs the base model's config is
in ``against_base.py``.
"""

from __future__ import annotations

import re

from axolotl_reft.plugin import quantised
from axolotl_reft.plugin.rules import Condition, Config, Table, find_subject, plain
from axolotl_reft.plugin.running import is_running


def _running(command: str) -> Condition:
    module = "axolotl.cli." + command.replace("-", "_")
    return lambda config: f"axolotl {command}" if is_running(module) else None


COMMANDS = (
    Table("adapter: loreft", {
        _running("merge-lora"): "a LoReFT adapter cannot be merged into the base "
        "model: it edits hidden states at some positions of a prompt, which no change "
        "of the weights can do; load it beside the base with PeftModel.from_pretrained",
        _running("quantize"): "it writes the weights of a whole model, and output_dir "
        "holds an adapter, a few megabytes that stay in float32; to quantise the base "
        "itself, use a config without adapter: and loreft:",
        _running("vllm-serve"): "vLLM would serve base_model without the adapter; "
        "answer with axolotl inference, or in Python with "
        "PeftModel.from_pretrained(base, output_dir).generate(...)",
        _running("merge-sharded-fsdp-weights"): "it rounds what it merges to bfloat16, "
        "in which an adapter's rotations are not exact, and writes no "
        "adapter_config.json; train with fsdp_config: final_state_dict_type: "
        "FULL_STATE_DICT, which leaves the whole adapter in output_dir",
    }),
)  # fmt: skip


def _optimizer(config: Config) -> str | None:
    name = str(config.get("optimizer"))
    of_matrices = ("galore", "apollo", "lomo", "adalomo", "q_galore")
    return f"optimizer: {name}" if name.startswith(of_matrices) else None


def _scoring_after_training(config: Config) -> str | None:
    """axolotl's LMEvalPlugin, which would fail when the training is over."""
    plugin = find_subject("plugins: LMEvalPlugin", config)
    on = config.settings.get("lm_eval_post_train") is not False
    scores = plugin and config.get("lm_eval_tasks") and on
    return "lm_eval_post_train: true (also when left out)" if scores else None


WEIGHTS = (
    Table("adapter: loreft", {
        "merge_lora": "a LoReFT adapter edits hidden states at some positions of a "
        "prompt, so it cannot be merged into weights; serve it beside the base model",
        "relora": "ReLoRA merges the adapter at every restart, and LoReFT cannot be "
        "merged; remove it",
        "loraplus_lr_ratio": "LoRA+ sets the learning rate of LoRA's B matrices, which "
        "LoReFT has not; remove it and set learning_rate",
        "unfrozen_parameters": "base weights that are unfrozen would not be saved with "
        "the adapter; name whole modules under loreft: modules_to_save, which are "
        "trained and saved with it",
        "lisa_n_layers": "LISA unfreezes layers of the base in turn, which would not "
        "be saved with the adapter; remove lisa_n_layers and lisa_step_interval, and "
        "choose what is edited with loreft: layers",
        "plugins: SpectrumPlugin": "it unfreezes weights of the base, which would not "
        "be saved with the adapter; remove it, and choose what is edited with loreft: "
        "layers",
        "fp8": "it trains the base's matrices in 8-bit floats, and LoReFT trains none "
        "of them; remove it, and set load_in_8bit: true for a smaller base",
        "qat": "it trains weights to be quantised, and LoReFT trains none of the "
        "base's; remove it, and set load_in_4bit: true for a quantised base",
        "optim_target_modules": "it chooses weights of the base to train, and LoReFT "
        "trains none of them; remove it",
        _optimizer: "it saves memory on the large matrices of a base, and LoReFT "
        "trains none of them; set optimizer: adamw_torch_fused",
        "process_reward_model": "process reward models are not supported; remove it, "
        "or train a reward_model",
        _scoring_after_training: "lm_eval's own model cannot load the adapter; set "
        "lm_eval_post_train: false, and after the training run axolotl reft lm-eval "
        "config.yml",
    }),
    Table("adapter: loreft", {
        key: "it would do nothing: no embeddings are trained; remove it, or train them "
        "with loreft: modules_to_save: [embed_tokens, lm_head]"
        for key in ("embedding_lr", "embedding_lr_scale")
    } | {
        "tokens": "they need new embeddings, which are trained and saved only where "
        "they are named; write\nloreft:\n  modules_to_save: [embed_tokens, lm_head]\n"
        "or the names that this base has for them",
    }, when=lambda config: not config.block.modules_to_save),
)  # fmt: skip


def _misplaced_modules(config: Config) -> str | None:
    """Unless validation has put the block's own there, where axolotl looks for them."""
    value = config.settings.get("lora_modules_to_save")
    misplaced = value and value != config.block.modules_to_save
    return f"lora_modules_to_save: {value}" if misplaced else None


def _lora_settings(config: Config) -> str | None:
    read_for_any_adapter = (
        "lora_model_dir", "lora_on_cpu", "lora_modules_to_save",
        "peft_autocast_adapter_dtype",
    )  # fmt: skip
    return ", ".join(
        f"{key}: {plain(value)}"
        for key, value in config.settings.items()
        if value and re.match("lora_|peft_|peft$", str(key))
        if key not in read_for_any_adapter
    )


LORA = (
    Table("adapter: loreft", {
        _misplaced_modules: "it is a setting of LoRA; write it into the block as\n"
        "loreft:\n  modules_to_save: [...]",
        _lora_settings: "settings of LoRA, which would do nothing; remove them. "
        "LoReFT's rank, layers and dropout are set in the loreft: block, and LoRA "
        "beside LoReFT under lora: in it",
    }),
)  # fmt: skip
_NO_VLLM = "vLLM does not edit hidden states"

PREFERENCE = (
    Table("adapter: loreft", {
        "rl: gdpo": "axolotl hands TRL the adapter twice, which TRL refuses; write rl: "
        "grpo with trl.multi_objective_aggregation: normalize_then_sum, which is the "
        "same",
        "rl: ebft": f"its rollouts come from vLLM, and {_NO_VLLM}, or are laid in "
        "blocks under a mask of their own; use rl: grpo",
    }),
    Table("adapter: loreft and rl: <rl>", {
        "rl_adapter_ref_model": "the reference is the base with the adapter switched "
        "off, and with a second model axolotl would not save the adapter; remove it",
        "trainer_cls": "LoReFT learns from axolotl's own trainers which tokens are "
        "answers; remove it",
    }, when=lambda config: config.get("rl")),
    Table("adapter: loreft", {
        "trl.use_vllm": f"{_NO_VLLM}, so that it would answer without the adapter; set "
        "trl.use_vllm: false, and transformers generates",
        "trl.async_prefetch": "it generates in a second thread with the model that is "
        "being trained; remove it",
        "trl.use_data_producer": f"it is made for generation by vLLM, and {_NO_VLLM}; "
        "remove it",
        "trl.sync_ref_model": "TRL keeps no reference model beside an adapter; remove "
        "it",
    }, when=lambda config: config.get("rl")),
    Table("lora_model_dir", {
        "precompute_ref_log_probs": "the reference is the adapter that training starts "
        "from, and TRL would compute its probabilities before that is loaded; remove "
        "precompute_ref_log_probs",
    }, when=lambda config: config.get("rl") and config.get("lora_model_dir")),
)  # fmt: skip

_DATA = ("datasets", "test_datasets")
_OR_ALL = "or edit every token with positions: all"
_RAW_TEXT = f"raw text has no prompt to edit; use instruction data, {_OR_ALL}"


def _raw_text(config: Config) -> str | None:
    for path in (f"{name}.type" for name in _DATA):
        for kind in config.values(path):
            if re.match(r"(completion|pretrain)(?![^.:])", str(kind)):
                return f"{path}: {kind}"
    return None


# With prompt positions, every sample must have a prompt that is not trained.
PROMPTS = (
    Table("positions: <positions>", {
        "train_on_inputs": "LoReFT takes the tokens before the first trained one for "
        "the prompt, and here there would be none; set train_on_inputs: false, "
        f"{_OR_ALL}",
        "pretraining_dataset": _RAW_TEXT,
        _raw_text: _RAW_TEXT,
        "plugins: DiffusionPlugin": "a diffusion language model has no prompt that "
        f"comes before its answer; remove it, {_OR_ALL}",
    } | {
        f"{name}.{key}: all": "the prompt would end at the end of the user's turn, and "
        f"not where the answer begins; write {key}: turn, {_OR_ALL}"
        for name in _DATA for key in ("train_on_eos", "train_on_eot")
    } | {
        f"{name}.roles_to_train: {role}": "its tokens are the prompt, which ends "
        f"before the first trained token; leave it out, {_OR_ALL}"
        for name in _DATA for role in ("system", "developer", "user", "human")
    }, when=lambda config: config.block.positions != "all"),
)  # fmt: skip

_SEQUENCE = (
    "each process would see a piece of a sequence and not know where its prompt begins"
)
_TENSOR = "PEFT supports tensor parallelism for LoRA alone"
_EXPERTS = "axolotl's expert parallelism cuts up and saves adapters of LoRA alone"
_STACK = "the layers of a process would not see the batch that prompts are read from"


def _asks_for_fsdp(config: Config) -> bool:
    return bool(config.settings.get("fsdp") or config.settings.get("fsdp_config"))


def _fsdp_of_launcher(config: Config) -> str | None:
    asked = find_subject("$ACCELERATE_USE_FSDP: true", config)
    return None if _asks_for_fsdp(config) else asked


def _fsdp1(config: Config) -> str | None:
    paths = ("fsdp_version", "fsdp_config.fsdp_version", "fsdp_config.version")
    version = next((found for path in paths if (found := config.get(path))), 1)
    old = _asks_for_fsdp(config) and str(version) != "2"
    return f"fsdp_version: {version}" if old else None


_WHOLE_LAYER = ("block_output", "block_input")
# Replicas (DDP), FSDP2 and ZeRO keep sequences and hidden states whole. Refused is what
# cuts up a sequence, a layer or the stack of layers.
PROCESSES = (
    Table("adapter: loreft", {
        f"{key} > 1": f"{reason}; set {key}: 1"
        for key, reason in (
            ("context_parallel_size", _SEQUENCE),
            ("sequence_parallel_degree", _SEQUENCE),
            ("tensor_parallel_size", _TENSOR),
            ("expert_parallel_size", _EXPERTS),
        )
    } | {
        f"$PARALLELISM_CONFIG_{kind}_SIZE > 1": f"{reason} (the launcher sets it); "
        f"unset PARALLELISM_CONFIG_{kind}_SIZE"
        for kind, reason in (
            ("CP", _SEQUENCE), ("SP", _SEQUENCE), ("TP", _TENSOR), ("EP", _EXPERTS)
        )
    } | {
        "$ACCELERATE_USE_MEGATRON_LM: true": f"{_STACK}; launch without",
        "deepspeed.tensor_parallel.autotp_size > 1": f"{_TENSOR}; remove it",
        "deepspeed.sequence_parallel_size > 1": f"{_SEQUENCE}; remove it",
        "deepspeed.pipeline.stages > 1": f"{_STACK}; remove it",
        _fsdp_of_launcher: "the launcher asks for FSDP and the config does not, so the "
        "adapter would be rounded to its mixed precision; write fsdp_version: 2 and "
        "fsdp_config: in the YAML",
        _fsdp1: "FSDP1 flattens trained and frozen parameters together and rounds the "
        "adapter to its mixed precision; set fsdp_version: 2",
    }),
    Table("component: <component>", {
        f"fsdp_config.{key}": "FSDP's checkpoints replay what is inside a layer "
        "without its batch; set gradient_checkpointing: true in its place, or "
        "component: block_output"
        for key in ("activation_checkpointing", "fsdp_activation_checkpointing")
    }, when=lambda config: config.block.component not in _WHOLE_LAYER),
)  # fmt: skip

COMPONENTS = (
    Table("component: <component>", {
        "tiled_mlp": "it would see pieces of a sequence and not know where the prompt "
        "is; remove it, or edit mlp_input or mlp_output",
    }, when=lambda config: re.search(
        r"^mlp_activation$|\bmlp\.\w+\.", config.block.component
    )),
    Table("component: <component>", {
        key: "Liger's kernel computes the activation and its product in one, and there "
        f"is nothing to edit in between; remove {key}, or edit mlp.down_proj.input, "
        "which is the product"
        for key in ("liger_glu_activation", "liger_swiglu")
    }, when=lambda config: re.search(
        r"^mlp_activation$|\.act_fn\.", config.block.component
    )),
)  # fmt: skip


SETTINGS = (
    *WEIGHTS, *LORA, *PREFERENCE, *PROMPTS, *PROCESSES, *COMPONENTS, *quantised.REFUSALS
)  # fmt: skip
