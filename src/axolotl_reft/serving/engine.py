"""Settings of an engine that LoReFT adapters can be served with.

Each row of the table was either run, or is refused here before the model is loaded.
"""

from __future__ import annotations

from typing import Any

from axolotl_reft.serving.adapters import ServedBase
from axolotl_reft.serving.layers import LAYERS, TRANSFORMERS_LAYERS

# Among --lora-target-modules, turns LoReFT on. It is no module's name, so that no
# layer of LoRA is made for it.
TARGET = "loreft"


def serves_loreft(vllm_config: Any) -> bool:
    """Return whether an engine was asked to serve LoReFT adapters."""
    lora_config = vllm_config.lora_config
    return lora_config is not None and TARGET in (lora_config.target_modules or ())


def served_base(vllm_config: Any) -> ServedBase:
    """Return what adapters must fit."""
    model_config = vllm_config.model_config
    return ServedBase(
        model_config.model,
        model_config.get_hidden_size(),
        model_config.hf_text_config.num_hidden_layers,
        vllm_config.lora_config.max_lora_rank,
    )


def layer_class(vllm_config: Any) -> str:
    """Return the class of the model's decoder layers; ``ValueError`` for a model whose
    layers were not compared."""
    model_config = vllm_config.model_config
    architecture = model_config.hf_config.architectures[0]
    of_vllm, of_transformers = (LAYERS, "vllm"), (TRANSFORMERS_LAYERS, "transformers")
    used, other = of_vllm, of_transformers
    if model_config.using_transformers_backend():
        used, other = other, used
    layers, implementation = used
    if architecture not in layers:
        remedy = (
            f"add --model-impl {other[1]}"
            if architecture in other[0]
            else "use generate of transformers, or serve the base without "
            f"--lora-target-modules {TARGET}"
        )
        raise ValueError(
            f"LoReFT: {architecture} cannot be served with LoReFT adapters as a model "
            f"of {implementation}, only {', '.join(layers)}; {remedy}"
        )
    return layers[architecture]


def check_engine(vllm_config: Any) -> None:
    """Raise ``ValueError`` for settings with which edits would be lost or moved, or
    that nobody has run with LoReFT."""
    layer_class(vllm_config)
    refused = [
        f"{setting}: {reason}"
        for setting, is_set, reason in _refused_settings(vllm_config)
        if is_set
    ]
    if refused:
        raise ValueError(
            f"LoReFT adapters (--lora-target-modules {TARGET}) cannot be served with "
            f"{'; '.join(refused)}"
        )


_UNTESTED = "it was never run with LoReFT; leave it out"
_DIVIDED = "edits need all layers and tokens in a process; set it to 1"


def _refused_settings(vllm_config: Any) -> list[tuple[str, bool, str]]:
    """Return each refused setting, whether it is set, and the reason and the remedy."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    device = vllm_config.device_config.device_type
    graphs = vllm_config.compilation_config.cudagraph_mode.name
    has_graphs = device == "cuda" and graphs != "NONE"
    sizes = {
        "pipeline": parallel.pipeline_parallel_size,
        "decode-context": parallel.decode_context_parallel_size,
        "prefill-context": parallel.prefill_context_parallel_size,
    }
    untested = {
        "--enable-dbo or --ubatch-size": parallel.use_ubatching,
        "--enable-expert-parallel": parallel.enable_expert_parallel,
        "--nnodes": parallel.nnodes > 1,
        "--distributed-executor-backend ray": (
            parallel.distributed_executor_backend == "ray"
        ),
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--speculative-config": vllm_config.speculative_config is not None,
    }
    return [
        ("CUDA graphs", has_graphs, "no GPU has proven them yet; add --enforce-eager"),
        (
            f"the device {device}",
            device not in ("cpu", "cuda"),
            "use an NVIDIA GPU or a CPU",
        ),
        (
            "VLLM_USE_V2_MODEL_RUNNER=1",
            vllm_config.use_v2_model_runner,
            "only the V1 runner has edits; unset it",
        ),
        (
            f"--runner {model.runner_type}",
            model.runner_type != "generate",
            "serve a model that generates",
        ),
        (
            "--enable-sleep-mode",
            model.enable_sleep_mode,
            "it would drop the adapters; leave it out",
        ),
        *(
            (f"--{name}-parallel-size {size}", size > 1, _DIVIDED)
            for name, size in sizes.items()
        ),
        *((setting, is_set, _UNTESTED) for setting, is_set in untested.items()),
    ]
