"""Functions of vLLM that are changed, where answers alone do not show it."""

import shutil

import pytest
from vllm.sampling_params import BeamSearchParams
from vllm_runs import Asked, ask, lora_request, prompts


@pytest.fixture(scope="module")
def llm(start):
    return start(enable_prefix_caching=True)


@pytest.fixture
def runner(llm):
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def test_the_runner_without_edits_is_told_to_be_unfit(llm):
    config = llm.llm_engine.vllm_config
    assert "LoReFT" in config._get_v2_model_runner_unsupported_features()


def test_a_forward_without_requests_edits_nothing(llm, runner, directory):
    rows = runner.loreft._rows
    ask(llm, directory, [Asked("all", [20, 21, 22])])
    assert rows.starts_E1[-1] > 0  # those of the last step
    runner._dummy_run(4)
    assert rows.starts_E1[-1] == 0


def test_other_files_in_an_adapter_s_directory_are_another_adapter(
    llm, directory, check
):
    prompt = prompts((70,), seed=60)[0]
    changed, answers = directory / "changed", []
    for adapter in ("last", "noreft", "first_and_last"):
        shutil.copytree(directory / adapter, changed, dirs_exist_ok=True)
        (answer,) = ask(llm, directory, [Asked("changed", prompt)])
        answers.append(answer._replace(asked=Asked(adapter, prompt)))
    check("files changed under the same name", answers)


def test_a_damaged_adapter_is_refused_and_others_go_on(llm, directory, check, tmp_path):
    shutil.copytree(directory / "last", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="LoReFT adapter 'damaged'"):
        ask(llm, tmp_path, [Asked("damaged", [20, 21])])
    answers = ask(llm, directory, [Asked("last", prompts((9,), seed=61)[0])])
    check("behind a refused request", answers)


def test_beam_search_is_refused(llm, directory):
    with pytest.raises(ValueError, match="beam search: vLLM would send each beam"):
        llm.beam_search(
            [{"prompt_token_ids": [20, 21, 22]}],
            BeamSearchParams(beam_width=2, max_tokens=4),
            lora_request=lora_request(directory, "last"),
        )
