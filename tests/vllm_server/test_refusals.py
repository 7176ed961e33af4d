"""Adapters that vLLM's ``LLM`` refuses, in this process."""

import os

# Before vllm is imported: the engine in this process, on whatever core.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import pytest
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams
from vllm_http import save_adapter, save_base, save_refused_adapters

pytestmark = pytest.mark.vllm

PROMPT = {"prompt_token_ids": list(range(20, 40))}
GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    save_base(folder)
    save_adapter(folder / "right", positions="f7+l7", rank=4)
    return folder


@pytest.fixture(scope="module")
def llm(directory):
    engine = LLM(
        str(directory / "base"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        enable_lora=True,
        lora_target_modules=["loreft"],
        max_lora_rank=8,
    )
    yield engine
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture
def right(directory):
    return LoRARequest("right", 1, str(directory / "right"))


def tokens(llm, lora_request):
    (output,) = llm.generate([PROMPT], GREEDY, lora_request=lora_request)
    return output.outputs[0].token_ids


def test_an_adapter_that_cannot_be_served_is_an_error_and_the_engine_goes_on(
    llm, directory, right
):
    answer, base = tokens(llm, right), tokens(llm, None)
    assert answer != base
    refused = save_refused_adapters(directory)
    for number, (name, (reason, remedy)) in enumerate(refused.items(), start=2):
        with pytest.raises(ValueError) as error:
            tokens(llm, LoRARequest(name, number, str(directory / name)))
        assert reason in str(error.value) and remedy in str(error.value)
        assert tokens(llm, right) == answer and tokens(llm, None) == base


def test_beam_search_is_refused_with_an_adapter_alone(llm, right):
    beams = BeamSearchParams(beam_width=2, max_tokens=3)
    for lora_request in (right, [right]):
        with pytest.raises(ValueError, match="use sampling with n"):
            llm.beam_search([PROMPT], beams, lora_request=lora_request)
    assert len(llm.beam_search([PROMPT], beams)[0].sequences) == 2
    assert tokens(llm, right) != tokens(llm, None)
