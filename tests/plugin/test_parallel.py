"""Which ways of using several processes are refused, and how Ray validates twice."""

import json

import pytest
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin.test_args import validated

FSDP2 = {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}
INSIDE = {"component": "mlp_output"}
REFUSED = [
    ({"context_parallel_size": 2}, "context_parallel_size: 2 .* part of a sequence"),
    ({"sequence_parallel_degree": 2}, "sequence_parallel_degree: 2 .* a sequence"),
    ({"tensor_parallel_size": 2}, "tensor_parallel_size: 2 .* LoRA alone; remove it"),
    ({"expert_parallel_size": 2}, "expert_parallel_size: 2 .* LoRA alone; remove it"),
    ({"deepspeed": {"tensor_parallel": {"autotp_size": 2}}},
     "deepspeed.tensor_parallel.autotp_size: 2 .*; remove it"),
    ({"deepspeed": {"sequence_parallel_size": 4}},
     "deepspeed.sequence_parallel_size: 4 .* part of a sequence"),
    ({"deepspeed": {"pipeline": {"stages": 2}}}, "deepspeed.pipeline.stages: 2"),
    ({"fsdp_config": {"offload_params": True}}, "fsdp_version: 1 .* fsdp_version: 2"),
    ({"fsdp_config": {"fsdp_version": 1}}, "fsdp_version: 1 with adapter: loreft: FSD"),
    ({"fsdp_config": {"version": 1}}, "fsdp_version: 1 with adapter: loreft: FSDP1"),
    ({"fsdp_version": 1, "fsdp_config": {"offload_params": True}}, "fsdp_version: 1 w"),
    ({"fsdp": ["full_shard"]}, "fsdp_version: 1 with adapter: loreft: FSDP1 flattens"),
    ({"loreft": INSIDE, "fsdp_version": 2,
      "fsdp_config": {"activation_checkpointing": True}},
     "activation_checkpointing: true with component: mlp_output: .* set gradient_chec"),
]  # fmt: skip
ENVIRONMENT = {
    "PARALLELISM_CONFIG_CP_SIZE": "2",
    "PARALLELISM_CONFIG_SP_SIZE": "2",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
    "PARALLELISM_CONFIG_EP_SIZE": "2",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_FSDP": "true",
}
ALLOWED = [
    {"context_parallel_size": 1, "tensor_parallel_size": 1},
    {"dp_shard_size": 2, **FSDP2},
    {"dp_shard_size": 2, "dp_replicate_size": 2, **FSDP2},
    {"fsdp_config": {"fsdp_version": 2}},
    {"fsdp_version": 2, "fsdp_config": {"activation_checkpointing": True}},
    {"loreft": INSIDE, **FSDP2},
    {"deepspeed": {"zero_optimization": {"stage": 3}}},
    {"ddp_find_unused_parameters": False},
]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cuts_up_a_sample_or_the_adapter_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        validated(**changes)


def test_a_deepspeed_config_is_looked_into(tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"tensor_parallel": {"autotp_size": 2}}))
    with pytest.raises(ValueError, match="deepspeed.tensor_parallel.autotp_size: 2"):
        validated(deepspeed=str(path))


@pytest.mark.parametrize("name", list(ENVIRONMENT))
def test_the_launcher_cannot_bring_it_in(name, monkeypatch):
    monkeypatch.setenv(name, ENVIRONMENT[name])
    with pytest.raises(ValueError, match=f"{name}.* with adapter: loreft: "):
        validated()
    monkeypatch.setenv(name, "false" if "USE" in name else "1")
    validated()


def test_fsdp_of_the_launcher_needs_the_config_to_say_so(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert validated(**FSDP2).fsdp_version == 2


@pytest.mark.parametrize("changes", ALLOWED)
def test_what_keeps_samples_whole_is_let_through(changes):
    assert validated(**changes).adapter == "loreft"


BLOCKS = st.fixed_dictionaries(
    {},
    optional={
        "layers": st.sampled_from(["all", 3, "0-2", [0, "-2--1"], [-1]]),
        "positions": st.sampled_from(["f7+l7", "f1", "l2", "all"]),
        "rank": st.sampled_from([1, 8, {"0-1": 2, "all": 4}, {0: 1, "all": 2}]),
        "tied_weights": st.booleans(),
        "intervention": st.sampled_from(["loreft", "noreft", "direft"]),
        "component": st.sampled_from(["block_output", "block_input"]),
        "dropout": st.sampled_from([0, 0.0, 0.1, None]),
        "act_fn": st.sampled_from([None, "gelu", "linear"]),
    },
)
BESIDE = st.fixed_dictionaries(
    {},
    optional={
        "gradient_checkpointing": st.booleans(),
        "sample_packing": st.booleans(),
        "bf16": st.sampled_from([True, False, "auto"]),
        "seed": st.integers(0, 9),
        "lora_model_dir": st.just("saved"),
        "val_set_size": st.sampled_from([0.0, 0.1]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "use_ray": st.booleans(),
    },
)


@settings(max_examples=10, deadline=None)
@given(block=st.none() | BLOCKS, beside=BESIDE, allowed=st.sampled_from(ALLOWED))
def test_validating_what_was_validated_changes_nothing(block, beside, allowed):
    """As Ray's workers do with the config that the driver dumped."""
    once = validated(**beside | {"loreft": block} | allowed)
    dumped = once.to_dict()
    again = validate_config(DictDefault(json.loads(json.dumps(dumped))))
    assert again.to_dict() == json.loads(json.dumps(dumped))
