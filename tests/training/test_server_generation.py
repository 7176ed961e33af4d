"""TRL's trainers generate with a server that holds the adapter of the step."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from conftest import build_model
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from trl_trainers import build_trainer
from vllm_stub import running_stub
from workspace import build_tokenizer

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def make_base():
    return build_model(vocab_size=len(build_tokenizer()), eos_token_id=2)


@pytest.fixture
def stub():
    with running_stub(make_base) as stub:
        stub.root = None  # the base of these trainers has no name
        yield stub


@pytest.fixture
def make(tmp_path, stub):
    def trainer(name="grpo", **changes):
        settings = {
            "use_vllm": True, "vllm_mode": "server", "max_steps": 3, "logging_steps": 1,
            "vllm_server_base_url": stub.url, "learning_rate": 0.05, "top_p": 0.99,
        }  # fmt: skip
        return build_trainer(name, tmp_path / "out", **settings | changes)

    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_each_steps_answers_are_of_its_adapter(make, stub, tmp_path):
    trainer = make(num_iterations=1, temperature=0.7)
    trainer.train()
    differences = logged(trainer, "sampling/sampling_logp_difference/max")
    assert len(differences) == 3 and max(differences) < 1e-4
    ratios = logged(trainer, "sampling/importance_sampling_ratio/mean")
    assert ratios == pytest.approx([1.0] * 3, abs=1e-3)

    loads, unloads = (
        stub.bodies(f"{verb}_lora_adapter") for verb in ("load", "unload")
    )
    names = [body["lora_name"] for body in loads]
    assert len(set(names)) == 3
    assert [body["lora_name"] for body in unloads] == names[:2]
    assert list(stub.loaded.values()) == [FILES]
    folders = [Path(body["lora_path"]) for body in loads]
    assert [folder.exists() for folder in folders] == [False, False, True]
    assert all(folder.is_relative_to(tmp_path / "out") for folder in folders)

    *_, request = stub.bodies("completions")
    prompts = request.pop("prompt")
    # Each of a batch's prompts once for every answer.
    assert len(prompts) == 4 and prompts == [prompts[0]] * 4
    assert request == {
        "model": names[-1], "max_tokens": 4, "temperature": 0.7, "top_p": 0.99,
        "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "logprobs": 0, "return_token_ids": True,
        "stop_token_ids": [2],
    }  # fmt: skip


def test_answers_of_the_base_would_show(make, stub):
    stub.edits = False
    trainer = make(max_steps=1)
    trainer.train()
    assert logged(trainer, "sampling/sampling_logp_difference/max")[0] > 0.1
    ratio = logged(trainer, "sampling/importance_sampling_ratio/mean")[0]
    assert abs(ratio - 1.0) > 0.01


@pytest.mark.parametrize("name", ["rloo", "ssd"])
def test_a_trainer_without_need_of_logprobs_asks_for_none(make, stub, name):
    trainer = make(name, max_steps=1, generation_kwargs={"stop": ["."]})
    trainer.train()
    requests = stub.bodies("completions")
    assert requests and len(stub.loaded) == 1
    for request in requests:
        assert request["logprobs"] is None and request["stop"] == ["."]


def test_a_failed_load_stops_the_training(make, stub):
    trainer = make()
    stub.refusals["load_lora_adapter"] = (400, {"error": "component: mlp_output"})
    with pytest.raises(RuntimeError, match="refused load_lora_adapter: 400 .*mlp_out"):
        trainer.train()
    assert trainer.state.global_step == 0 and not stub.loaded
    assert all("allowed_token_ids" in body for body in stub.bodies("completions"))


def test_images_are_refused(make):
    with pytest.raises(ValueError, match="use_vllm with images in the prompts"):
        make().vllm_generation.generate([[1]], [["image"]], 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vllm_mode": "colocate"}, "merges them into the base; set vllm_mode: server"),
        ({"generation_kwargs": {"seed": 3}}, "generation_kwargs seed cannot be used"),
    ],
)
def test_settings_that_it_cannot_follow_are_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("name", ["is_fsdp", "is_zero3"])
def test_an_adapter_in_parts_is_refused(make, monkeypatch, name):
    parts = {"is_fsdp": False, "is_zero3": False, name: True}
    monkeypatch.setattr(
        vllm_generation, "DistributedBackend", lambda _: SimpleNamespace(**parts)
    )
    with pytest.raises(ValueError, match="no process has the whole adapter to send"):
        make()


def test_a_trainer_without_the_adapter_keeps_trls_generation(make, stub):
    make()
    count = len(stub.requests)
    parts = {"accelerator": Accelerator(), "model": None, "mode": "server"}
    with pytest.raises(ImportError, match="vLLM is not available"):
        VLLMGeneration._init_vllm(SimpleNamespace(**parts))
    assert len(stub.requests) == count
