"""Every mistake in a YAML, and what its writer reads; no model is loaded."""

import pytest
from axolotl.utils.config import validate_config
from yaml_config import validated

from axolotl_reft import LoreftConfig, LoreftPlugin
from axolotl_reft.plugin.args import LoreftBlock, adapter_settings


def test_a_good_config_gets_every_default():
    assert validated().loreft.to_dict() == {
        "layers": "all",
        "positions": "f7+l7",
        "rank": 8,
        "turns": "every",
        "tied_weights": True,
        "intervention": "loreft",
        "component": "block_output",
        "dropout": 0.0,
        "init_weights": "random",
        "frozen_prompt": "auto",
    }


def test_without_a_block_the_adapter_has_its_defaults():
    assert validated(loreft=...).loreft == validated(loreft={}).loreft
    assert validated(loreft={"rank": None}).loreft.rank == 8


def test_validating_what_was_validated_changes_nothing():
    """As Ray's workers do with the dumped config."""
    once = validated(loreft={"layers": [0, "-2--1"], "act_fn": "gelu", "rank": 2})
    block = once.loreft.to_dict()
    assert validate_config(once).loreft.to_dict() == block


def test_without_the_adapter_the_plugin_asks_for_nothing():
    assert validated(adapter="lora", lora_r=8, lora_alpha=16, loreft=...).loreft is None
    assert validated(adapter=..., loreft=...).adapter is None


def test_ranks_may_differ_by_layer():
    block = validated(loreft={"rank": {"0-7": 4, 8: 2, "all": 1}}).loreft
    assert LoreftConfig(**adapter_settings(block)).rank == {"0-7": 4, "8": 2, "all": 1}


def test_layers_of_ranks_may_be_numbers_beside_text():
    """axolotl sorts the keys when it prints the settings."""
    rank = validated(loreft={"rank": {3: 8, "1-2": 2, "all": 4}}).loreft.rank
    assert rank.to_dict() == {"3": 8, "1-2": 2, "all": 4}


def test_every_key_is_described():
    assert all(field.description for field in LoreftBlock.model_fields.values())


IN_THE_BLOCK = [
    ({"ranks": 8}, "loreft: unknown key 'ranks'. Did you mean 'rank'. Known keys: lay"),
    ({"layer": 8}, "loreft: unknown key 'layer'. Did you mean 'layers'."),
    ({"tie_weights": True}, "Did you mean 'tied_weights'."),
    ({"zzz": 8}, "loreft: unknown key 'zzz'. Known keys: layers, positions, rank"),
    (
        {"low_rank_dimension": 4},
        "key 'low_rank_dimension'. low_rank_dimension: here it is rank. Known",
    ),
    (
        {"num_interventions": 4},
        "num_interventions: which tokens are edited is found in",
    ),
    (
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]},
        "unknown keys 'r', 'lora_alpha', 'target_modules'. r: here it is rank. lora_"
        "alpha: remove it, .* target_modules: here layers and component say",
    ),
    ({"positions": "f7-l7"}, "positions: 'f7-l7' is not understood. Write f<n>"),
    ({"positions": "f0"}, "positions: 'f0' is not understood"),
    ({"positions": "l-1"}, "positions: 'l-1' is not understood"),
    ({"positions": ""}, "positions: '' is not understood"),
    ({"rank": 0}, "rank: 0 is not a whole number of at least 1"),
    ({"rank": "four"}, "rank: 'four' is not a whole number"),
    ({"layers": "1:4"}, "layers: '1:4' is not understood"),
    ({"intervention": "LoReFT"}, "'LoReFT' is unknown. Did you mean 'loreft'?"),
    ({"intervention": "loref"}, "intervention: 'loref' is unknown. Did you mean 'lore"),
    ({"component": "mlp_outpt"}, "'mlp_outpt' is unknown. Did you mean 'mlp_output'"),
    ({"dropout": 2}, "dropout: 2 is not a number from 0 to below 1"),
    ({"act_fn": "rellu"}, "act_fn: 'rellu' is unknown. Did you mean 'relu'"),
]
BESIDE_IT = [
    ({"loreft": 8}, "loreft: 8 is not a block of settings"),
    ({"adapter": "LoReFT"}, "adapter: 'LoReFT' is written adapter: loreft"),
    ({"adapter": ...}, "loreft: the block is set, but adapter is None; set adapter: l"),
    ({"adapter": "lora", "lora_r": 8}, "the block is set, but adapter is 'lora'"),
    ({"loreft_rank": 8}, "loreft_rank: is not a key at the top of the config. The ad"),
    ({"loreft_layers": "all"}, "loreft_layers: is not a key at the top of the config. "
     "The adapter's settings go into a block"),
    ({"loreft_labeled_logits": True}, "loreft_labeled_logits: is not a key at the top "
     "of the config. Did you mean 'loreft_labelled_logits'"),
    ({"reft": {"rank": 8}}, "reft: is not a key at the top of the config"),
    ({"positions": "f1"}, "positions: is not a key at the top of the config. The ada"),
    ({"share_weights": True}, "share_weights: is not a key at the top of the config. "
     "share_weights: here it is tied_weights. The adapter's settings go into"),
    ({"lora_r": 8}, "lora_r: 8 with adapter: loreft: settings of LoRA, which would do"),
    ({"lora_dropout": 0.1}, "lora_dropout: 0.1 with adapter: loreft: settings of LoRA"),
    ({"lora_r": 8, "lora_alpha": 16},
     "lora_r: 8, lora_alpha: 16 with adapter: loreft: settings of LoRA, which would "
     "do nothing; remove them. "),
    ({"lora_target_linear": True}, "lora_target_linear: true with .* settings of LoRA"),
    ({"peft_use_dora": True}, "peft_use_dora: true with .* settings of LoRA"),
    ({"lora_mlp_kernel": True}, "lora_mlp_kernel: true with .* settings of LoRA"),
    ({"loraplus_lr_ratio": 16.0}, "loraplus_lr_ratio: 16.0 with adapter: loreft"),
    ({"relora": True, "jagged_restart_steps": 10}, "relora: true .* cannot be merg"),
    ({"lisa_n_layers": 2, "lisa_step_interval": 5},
     "lisa_n_layers: 2 with adapter: loreft: it would train weights of the base"),
    ({"merge_lora": True}, "merge_lora: true with .*: LoReFT edits hidden states"),
    ({"unfrozen_parameters": ["lm_head"]}, "unfrozen_parameters: .* modules_to_save"),
    ({"fp8": True}, "fp8: true with .*: LoReFT trains no weights of the base"),
    ({"qat": {"weight_dtype": "int8"}}, "qat: .*: LoReFT trains no weights of the"),
    ({"tokens": ["<a>"]}, "tokens: <a> with no modules_to_save: their em"),
    ({"lora_modules_to_save": ["lm_head"]},
     "lora_modules_to_save: .* write\nloreft:\n  modules_to_save"),
    ({"embedding_lr": 1e-4},
     "embedding_lr: 0.0001 with no modules_to_save: no embeddings"),
    ({"optimizer": "galore_adamw"}, "optimizer: galore_adamw with adapter: loreft"),
    ({"optimizer": "adalomo"}, "optimizer: adalomo with adapter: loreft"),
    ({"optim_target_modules": ["mlp"]},
     "optim_target_modules: mlp .* trains no weights of"),
    ({"process_reward_model": True}, "process_reward_model: true .* train a reward_mo"),
    ({"tiled_mlp": True, "loreft": {"component": "mlp_activation"}},
     "tiled_mlp: true with component: mlp_activation: it would see pieces of a seq"),
    ({"tiled_mlp": True, "loreft": {"component": "mlp.down_proj.output"}},
     "tiled_mlp: true with component: mlp.down_proj.output"),
    ({"liger_glu_activation": True, "loreft": {"component": "mlp_activation"},
      "plugins": ["axolotl_reft.LoreftPlugin",
                  "axolotl.integrations.liger.LigerPlugin"]},
     "liger_glu_activation: true with component: mlp_activation: Liger's kernel"),
    ({"datasets": [{"path": "x", "type": "chat_template", "train_on_eos": "all"}]},
     "datasets.train_on_eos: all with positions: f7.l7: .* write turn in place of all"),
    ({"datasets": [{"path": "x", "type": "chat_template", "train_on_eot": "all"}]},
     "datasets.train_on_eot: all with positions: f7.l7"),
    ({"datasets": [{"path": "x", "type": "chat_template",
                    "roles_to_train": ["assistant", "user"]}]},
     "datasets.roles_to_train: user with positions: f7.l7: its tokens are the prom"),
    ({"plugins": ["axolotl_reft.LoreftPlugin",
                  "axolotl.integrations.diffusion.DiffusionPlugin"]},
     "plugins: .*DiffusionPlugin with positions: f7.l7: a diffusion language model"),
    ({"plugins": ["axolotl_reft.LoreftPlugin",
                  "axolotl.integrations.spectrum.SpectrumPlugin"]},
     "plugins: .*SpectrumPlugin with adapter: loreft: it would train weights of the b"),
    ({"train_on_inputs": True}, "train_on_inputs: true with positions: f7.l7: .* set t"
     "rain_on_inputs: false, or edit every token with positions: all"),
    ({"datasets": [{"path": "x", "type": "completion"}]},
     "datasets.type: completion with positions: f7.l7: raw text has no prompt"),
    ({"test_datasets": [{"path": "x", "type": "completion"}]},
     "test_datasets.type: completion with positions"),
    ({"datasets": ..., "pretraining_dataset": [{"path": "x"}], "max_steps": 1},
     "pretraining_dataset: .* with positions: f7.l7: raw text has no prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("block", "message"), IN_THE_BLOCK)
def test_a_mistake_in_the_block(block, message):
    with pytest.raises(ValueError, match=message):
        validated(loreft=block)
    with pytest.raises(ValueError, match=message):
        LoreftBlock(**block)


@pytest.mark.parametrize(("changes", "message"), BESIDE_IT)
def test_a_mistake_beside_the_block(changes, message):
    with pytest.raises(ValueError, match=message):
        validated(**changes)


def test_the_message_is_the_first_line_that_is_read():
    with pytest.raises(ValueError) as error:
        validated(loreft={"ranks": 8})
    assert str(error.value).startswith("loreft: unknown key 'ranks'")


@pytest.mark.parametrize(("changes", "message"), BESIDE_IT)
def test_validation_alone_refuses_it_too(changes, message, monkeypatch):
    """Without `register`, as where a dumped config is validated again."""
    monkeypatch.setattr(LoreftPlugin, "register", lambda self, cfg: None)
    with pytest.raises((ValueError, ImportError)):
        validated(**changes)


def test_modules_to_save_are_put_where_axolotl_looks_for_them():
    names = ["embed_tokens", "lm_head"]
    cfg = validated(
        loreft={"modules_to_save": names}, tokens=["<a>"], embedding_lr=1e-4
    )
    assert cfg.lora_modules_to_save == cfg.loreft.modules_to_save == names
    assert validate_config(cfg).lora_modules_to_save == names


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto", "orpo", "simpo", "grpo"])
def test_preference_training_is_let_be(method):
    data = [{"path": "x", "type": "chatml.intel", "split": "train"}]
    trl = {"num_generations": 2}
    validated(
        rl=method,
        datasets=data,
        trl=trl,
        micro_batch_size=2,
        remove_unused_columns=False,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"train_on_inputs": True},
        {"datasets": [{"path": "x", "type": "completion"}]},
        {"datasets": [{"path": "x", "type": "chat_template", "train_on_eos": "all"}]},
    ],
)
def test_editing_every_token_needs_no_prompt(changes):
    assert validated(loreft={"positions": "all"}, **changes).loreft.positions == "all"


def test_an_mlp_in_pieces_can_be_edited_as_a_whole():
    assert validated(tiled_mlp=True, loreft={"component": "mlp_output"}).tiled_mlp


def test_losses_that_keep_the_labels_to_themselves_are_welcome():
    assert validated(use_eaft=True).use_eaft


def test_settings_of_lora_that_say_nothing_are_let_be():
    assert validated(
        lora_dropout=0.0, lora_r=None, lora_model_dir="x", lora_on_cpu=True
    )


@pytest.mark.parametrize("datasets", ["data.jsonl", {"path": "x"}, 5])
def test_of_test_datasets_that_are_no_list_axolotl_speaks(datasets):
    """Its own message, and none of Python's about what we did with them."""
    with pytest.raises(
        ValueError, match="test_datasets\n  Input should be a valid lis"
    ):
        validated(test_datasets=datasets)
