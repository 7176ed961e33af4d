"""Settings of an engine: each refused one by its name, with the remedy."""

import re
from types import SimpleNamespace

import pytest
from stub_engine import HIDDEN, LAYERS, build_config

from axolotl_reft.serving.engine import (
    check_engine,
    layer_class,
    served_base,
    serves_loreft,
)

UNTESTED = "it was never run with LoReFT; leave it out"
DIVIDED = "edits need all layers and tokens in a process; set it to 1"
REFUSED = [
    (
        {"parallel_config.pipeline_parallel_size": 2},
        "--pipeline-parallel-size 2",
        DIVIDED,
    ),
    (
        {"parallel_config.decode_context_parallel_size": 4},
        "--decode-context-parallel-size 4",
        DIVIDED,
    ),
    (
        {"parallel_config.prefill_context_parallel_size": 2},
        "--prefill-context-parallel-size 2",
        DIVIDED,
    ),
    (
        {"parallel_config.use_ubatching": True},
        "--enable-dbo or --ubatch-size",
        UNTESTED,
    ),
    (
        {"parallel_config.enable_expert_parallel": True},
        "--enable-expert-parallel",
        UNTESTED,
    ),
    ({"parallel_config.nnodes": 2}, "--nnodes", UNTESTED),
    (
        {"parallel_config.distributed_executor_backend": "ray"},
        "--distributed-executor-backend ray",
        UNTESTED,
    ),
    ({"kv_transfer_config": object()}, "--kv-transfer-config", UNTESTED),
    ({"speculative_config": object()}, "--speculative-config", UNTESTED),
    (
        {"use_v2_model_runner": True},
        "VLLM_USE_V2_MODEL_RUNNER=1",
        "only the V1 runner has edits; unset it",
    ),
    (
        {"model_config.runner_type": "pooling"},
        "--runner pooling",
        "serve a model that generates",
    ),
    (
        {"model_config.enable_sleep_mode": True},
        "--enable-sleep-mode",
        "it would drop the adapters; leave it out",
    ),
    (
        {"device_config.device_type": "cuda"},
        "CUDA graphs",
        "no GPU has proven them yet; add --enforce-eager",
    ),
    (
        {"device_config.device_type": "xpu"},
        "the device xpu",
        "use an NVIDIA GPU or a CPU",
    ),
]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "device_config.device_type": "cuda",
            "compilation_config.cudagraph_mode": SimpleNamespace(name="NONE"),
        },
    ],
    ids=["a CPU", "a GPU without graphs"],
)
def test_what_was_run_is_served(changes):
    check_engine(build_config(**changes))


@pytest.mark.parametrize(("changes", "setting", "remedy"), REFUSED)
def test_a_setting_is_refused_by_name(changes, setting, remedy):
    message = (
        "LoReFT adapters (--lora-target-modules loreft) cannot be served with "
        f"{setting}: {remedy}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_engine(build_config(**changes))


def test_all_refused_settings_are_told_at_once():
    changes = {name: value for given, *_ in REFUSED for name, value in given.items()}
    with pytest.raises(ValueError) as caught:
        check_engine(build_config(**changes))
    told = [setting for _, setting, _ in REFUSED if setting in str(caught.value)]
    assert len(told) == len(REFUSED) - 1  # of two devices, the last


def test_a_model_whose_layers_were_not_compared_is_refused_by_name():
    with pytest.raises(
        ValueError,
        match="LoReFT: Exaone4ForCausalLM cannot be served with LoReFT adapters as "
        "a model of vllm, only Gemma2ForCausalLM, .*; use generate of transformers, or "
        "serve the base without --lora-target-modules loreft",
    ):
        check_engine(build_config("Exaone4ForCausalLM"))


@pytest.mark.parametrize(
    ("architecture", "is_of_transformers", "other"),
    [("CohereForCausalLM", False, "transformers"), ("Qwen3ForCausalLM", True, "vllm")],
)
def test_the_implementation_that_was_compared_is_named(
    architecture, is_of_transformers, other
):
    changes = {"model_config.using_transformers_backend": lambda: is_of_transformers}
    with pytest.raises(ValueError, match=f"; add --model-impl {other}$"):
        check_engine(build_config(architecture, **changes))


def test_a_model_s_layers_are_known_by_its_architecture():
    assert layer_class(build_config()) == "LlamaDecoderLayer"
    assert layer_class(build_config("Phi3ForCausalLM")) == "LlamaDecoderLayer"
    of_transformers = {"model_config.using_transformers_backend": lambda: True}
    config = build_config("GPTNeoXForCausalLM", **of_transformers)
    assert layer_class(config) == "GPTNeoXLayer"


@pytest.mark.parametrize(
    ("lora_config", "serves"),
    [
        (None, False),
        (SimpleNamespace(target_modules=None), False),
        (SimpleNamespace(target_modules=["q_proj"]), False),
        (SimpleNamespace(target_modules=["loreft"]), True),
        (SimpleNamespace(target_modules=["q_proj", "loreft"]), True),
    ],
)
def test_an_engine_serves_loreft_where_it_was_asked_to(lora_config, serves):
    assert serves_loreft(build_config(lora_config=lora_config)) == serves


def test_what_adapters_must_fit():
    base = served_base(build_config())
    assert (base.name, base.hidden_size, base.layers) == ("base", HIDDEN, LAYERS)
    assert base.max_rank == 4
