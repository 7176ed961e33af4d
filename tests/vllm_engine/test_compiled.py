"""Compiled models: nothing splits the graph, and none is taken from an engine that
compiled it without edits."""

from itertools import cycle
from pathlib import Path

import pytest
from vllm.compilation.counter import compilation_counter
from vllm.config.compilation import CompilationMode
from vllm.config.lora import LoRAConfig
from vllm.platforms.cpu import CpuPlatform
from vllm.plugins import load_general_plugins
from vllm_runs import (
    Reference,
    ask,
    conversation,
    every,
    prompts,
    save_adapters,
    save_base,
)

import axolotl_reft.serving.wrapped_engine as wrapped_engine

ADAPTERS = ["first_and_last", "untied", "all", "every_turn"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The cache of this module's engines, which compile: on a CPU, vLLM compiles
    nothing where LoRA is on."""
    update = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        update(cls, vllm_config)
        vllm_config.lora_config = lora_config

    with pytest.MonkeyPatch.context() as patch:
        name = "check_and_update_config"
        patch.setattr(CpuPlatform, name, classmethod(check_and_update_config))
        root = tmp_path_factory.mktemp("cache")
        patch.setenv("VLLM_CACHE_ROOT", str(root))
        yield root


def test_a_graph_without_edits_is_not_taken_from_the_cache(
    start, cache, tmp_path, check
):
    save_base(tmp_path, num_hidden_layers=2)
    save_adapters(tmp_path, ADAPTERS)
    reference = Reference(tmp_path, ADAPTERS)
    texts = [*prompts((1, 2, 15, 33, 64)), conversation((9, 4))]

    def answer(targets, adapters):
        llm = start(tmp_path, enforce_eager=False, lora_target_modules=targets)
        mode = llm.llm_engine.vllm_config.compilation_config.mode
        assert mode == CompilationMode.DYNAMO_TRACE_ONCE
        asked = zip(every(texts, adapters), cycle((1.0, 0.5)), strict=False)
        strengths = [a._replace(strength=s) if a.adapter else a for a, s in asked]
        return ask(llm, tmp_path, strengths)

    compiled = compilation_counter.num_aot_compiles
    without = answer(["q_proj"], [None])
    check("compiled, without loreft", without, reference=reference)
    graphs = _graphs(cache)
    # vLLM compiles with fullgraph=True: what splits a graph is an error.
    answers = answer(["loreft"], (None, *ADAPTERS))
    kind = "compiled, behind an engine without loreft"
    check(kind, answers, reference=reference)
    # On a CPU, vLLM writes them but fails to load them again.
    assert len(graphs) == 1 and len(_graphs(cache)) == 2
    assert compilation_counter.num_aot_compiles == compiled + 2


def test_another_release_of_the_package_has_other_graphs(monkeypatch):
    load_general_plugins()
    loreft, lora = (
        LoRAConfig(max_lora_rank=8, target_modules=[name])
        for name in ("loreft", "q_proj")
    )
    ours, theirs = loreft.compute_hash(), lora.compute_hash()
    assert loreft.compute_hash() == ours != theirs
    monkeypatch.setattr(wrapped_engine, "package_version", lambda: "0.0.0")
    assert loreft.compute_hash() != ours
    assert lora.compute_hash() == theirs


def _graphs(root: Path) -> set[Path]:
    return set(root.glob("torch_compile_cache/torch_aot_compile/*"))
