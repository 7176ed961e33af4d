"""What use_frozen_prompt turns on, with how much memory, and what it says."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import build_adapter, build_model
from frozen_prompts import TOLERANCE, difference, ragged, results

from axolotl_reft.training import frozen_prompt
from axolotl_reft.training.frozen_prompt import free_memory, use_frozen_prompt

BATCH = ragged([20, 17], [14, 10])
HOST = torch.device("cpu")


@pytest.fixture
def model():
    return build_adapter(build_model(), positions="l3").train()


def frozen_of(model):
    return model.get_base_model().loreft_hooks.frozen_prompt


def use(model, *args):
    told = []
    use_frozen_prompt(model, *args, tell=told.append)
    return told


def test_off_leaves_the_model_as_it_was(model):
    backbone = model.get_base_model().model
    plain = backbone.forward
    use(model, True)
    assert "forward" in vars(backbone)
    assert use(model, False) == [
        "frozen prompt: computed with the rest, since frozen_prompt is false"
    ]
    assert backbone.forward == plain
    assert "forward" not in vars(backbone)
    assert frozen_of(model) is None


def test_it_may_be_turned_on_again_and_removed_with_the_adapter(model):
    expected = results(model, BATCH)
    for _ in range(3):
        use(model, True, "1MB")
        assert difference(results(model, BATCH), expected) < TOLERANCE
    base = model.unload()
    assert "forward" not in vars(base.model)


def test_a_forward_that_another_put_there_stays(model):
    """As accelerate's: it is called, and comes back."""
    backbone, calls = model.get_base_model().model, []
    plain = backbone.forward

    def forward(*args, **kwargs):
        calls.append(kwargs)
        return plain(*args, **kwargs)

    backbone.forward = forward
    use(model, True)
    results(model, BATCH)
    assert calls
    use(model, False)
    assert backbone.forward is forward


def test_what_is_said_names_the_tokens_and_the_memory(model):
    told = use(model, True, "1.5GB")
    for _ in range(2):
        results(model, BATCH)
    assert told == [
        "frozen prompt: computed without gradients, 18 of 37 tokens of the first "
        "batch; kept in up to 1.5 GB of host memory"
    ]
    told = use(model, True, 0)
    results(model, BATCH)
    assert told[0].endswith("first batch; not kept")


def test_by_default_a_quarter_of_the_free_memory_by_process(model, monkeypatch):
    monkeypatch.setattr(frozen_prompt, "free_memory", lambda device: 16 * 10**9)
    use(model, "auto")
    assert frozen_of(model).kept.limit == 4 * 10**9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    use(model, "auto")
    assert frozen_of(model).kept.limit == 10**9
    told = use(model, "auto", "1TB")
    assert frozen_of(model).kept.limit <= 0.8 * 16 * 10**9
    assert told[0].startswith("frozen_prompt_cache: ")
    use(model, "auto", {"device": "2MB"})
    kept = frozen_of(model).kept
    assert (kept.limit, kept.device) == (2 * 10**6, HOST)


@pytest.mark.parametrize(
    ("most", "expected"), [("max\n", 100), ("60\n", 60 - 30 + 5), ("1000\n", 100)]
)
def test_free_memory_is_that_of_the_control_group(
    most, expected, monkeypatch, tmp_path
):
    memory = SimpleNamespace(available=100)
    monkeypatch.setattr(frozen_prompt.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(frozen_prompt, "_CGROUP", tmp_path)
    assert free_memory(HOST) == 100
    (tmp_path / "memory.max").write_text(most)
    (tmp_path / "memory.current").write_text("30\n")
    (tmp_path / "memory.stat").write_text("anon 20\ninactive_file 5\n")
    assert free_memory(HOST) == expected


@pytest.mark.parametrize("cache", ["20KB", "3KB", "1KB", 0])
def test_with_little_memory_results_are_the_same(model, cache):
    batches = [ragged([20, 17, 9], [14, 10, 4], seed=seed) for seed in range(4)]
    expected = [results(model, batch) for batch in batches]
    use(model, True, cache)
    kept = frozen_of(model).kept
    for _ in range(8):
        for batch, right in zip(batches, expected, strict=True):
            assert difference(results(model, batch), right) < TOLERANCE
            assert kept.bytes <= kept.limit
    assert len(kept) == 0 or kept.bytes > 0


def test_a_copy_of_the_model_computes_the_same(model):
    expected = results(model, BATCH)
    use(model, True, "1MB")
    results(model, BATCH)
    other = copy.deepcopy(model)
    assert difference(results(other, BATCH), expected) < TOLERANCE
    weights = other.get_base_model().model.layers[0].base_layer.self_attn.q_proj.weight
    with torch.no_grad():
        weights.mul_(2)
    got = results(other, BATCH)
    use(other, False)
    assert difference(got, results(other, BATCH)) < TOLERANCE
    assert difference(results(model, BATCH), expected) < TOLERANCE
