"""Every architecture of the tables, and others, refused before a model is read."""

import pickle
import sys
from pathlib import Path

import pytest
import vllm_runs
from transformers import AutoConfig
from vllm_runs import Reference, ask, conversation, every, prompts

from axolotl_reft.serving.layers import LAYERS, TRANSFORMERS_LAYERS

ADAPTERS = ["first_and_last", "untied", "all", "every_turn"]
WINDOWS = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 96}
ALL_HEADS = {"num_key_value_heads": 4}
# By architecture, its name in transformers and settings of the tiny model.
OF_VLLM = {
    "Gemma2ForCausalLM": ("gemma2", WINDOWS),
    "Gemma3ForCausalLM": ("gemma3_text", WINDOWS),
    "GemmaForCausalLM": ("gemma", {}),
    "Glm4ForCausalLM": ("glm4", {}),
    "GraniteForCausalLM": ("granite", {}),
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("mistral", {"sliding_window": 16}),
    "MixtralForCausalLM": ("mixtral", {"num_local_experts": 4, **EXPERTS}),
    "Phi3ForCausalLM": ("phi3", {}),
    "Qwen2ForCausalLM": ("qwen2", {}),
    "Qwen3ForCausalLM": ("qwen3", {}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {"num_experts": 4, **EXPERTS}),
}
OF_TRANSFORMERS = {
    "ArceeForCausalLM": ("arcee", {}),
    "CohereForCausalLM": ("cohere", {"logit_scale": 1.0}),
    "GPTNeoXForCausalLM": ("gpt_neox", ALL_HEADS),
    "GlmForCausalLM": ("glm", {}),
    "HeliumForCausalLM": ("helium", {}),
    "LlamaForCausalLM": ("llama", {}),
    "Olmo2ForCausalLM": ("olmo2", {}),
    "Olmo3ForCausalLM": ("olmo3", {}),
    "OlmoForCausalLM": ("olmo", {}),
    "PhiForCausalLM": ("phi", ALL_HEADS),
    "SeedOssForCausalLM": ("seed_oss", {}),
    "SmolLM3ForCausalLM": ("smollm3", {}),
    "Starcoder2ForCausalLM": ("starcoder2", {}),
}
ASKED = every([*prompts((1, 2, 5, 17, 40)), conversation((4, 9))], (None, *ADAPTERS))


def _save(path: Path, architecture: str, settings: dict) -> None:
    vllm_runs.save_base(path, architecture, **settings)
    vllm_runs.save_adapters(path, ADAPTERS)


def test_every_row_of_the_tables_is_run():
    assert set(OF_VLLM) == set(LAYERS)
    assert set(OF_TRANSFORMERS) == set(TRANSFORMERS_LAYERS)


@pytest.mark.parametrize("name", OF_VLLM)
def test_a_model_of_vllm(start, tmp_path, check, name):
    _save(tmp_path, *OF_VLLM[name])
    reference = Reference(tmp_path, ADAPTERS)
    assert type(reference.model.get_base_model()).__name__ == name
    llm = start(tmp_path)
    check(f"{name}, vLLM's model", ask(llm, tmp_path, ASKED), reference=reference)


@pytest.fixture(scope="module")
def answers_of_transformers(tmp_path_factory):
    """In a process of its own: vLLM changes the classes of transformers, which then
    cannot be called outside of it."""
    directory = tmp_path_factory.mktemp("transformers")
    for name, model in OF_TRANSFORMERS.items():
        _save(directory / name, *model)
    vllm_runs.run_apart(__file__, directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_a_model_of_transformers(answers_of_transformers, check, name):
    directory = answers_of_transformers / name
    reference = Reference(directory, ADAPTERS)
    answers = pickle.loads((directory / "answers").read_bytes())
    check(f"{name}, transformers' model", answers, reference=reference)


@pytest.mark.parametrize(
    ("name", "architecture", "implementation", "remedy"),
    [
        ("CohereForCausalLM", "cohere", "auto", "--model-impl transformers"),
        ("Exaone4ForCausalLM", "exaone4", "auto", "generate of transformers"),
        ("GPT2LMHeadModel", "gpt2", "auto", "generate of transformers"),
        ("OPTForCausalLM", "opt", "auto", "generate of transformers"),
        ("StableLmForCausalLM", "stablelm", "auto", "generate of transformers"),
        ("Qwen3ForCausalLM", "qwen3", "transformers", "--model-impl vllm"),
    ],
)
def test_another_model_is_refused_before_it_is_read(
    start, tmp_path, name, architecture, implementation, remedy
):
    config = AutoConfig.for_model(architecture, architectures=[name])
    config.save_pretrained(tmp_path / "base")  # and no parameters
    with pytest.raises(ValueError, match=f"{name} cannot be served.*{remedy}"):
        start(tmp_path, model_impl=implementation)


if __name__ == "__main__":
    for name in OF_TRANSFORMERS:
        path = Path(sys.argv[1]) / name
        llm = vllm_runs.start(path, model_impl="transformers")
        (path / "answers").write_bytes(pickle.dumps(ask(llm, path, ASKED)))
        vllm_runs.stop(llm)
        del llm
