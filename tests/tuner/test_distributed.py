"""Several processes on the CPU compute what one process computes."""

import pytest
import torch
from conftest import build_model
from distributed_runs import DDP_CASES, STEPS, join, launch, train_replicated
from peft import PeftModel
from sharded_runs import FSDP_CASES, PROBE, train_sharded

pytestmark = pytest.mark.slow

ROUNDED = ("rounded", "LoRA beside it, mixed precision")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """What one process and two have left, each after all trainings."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    runs = [train_replicated, train_sharded]
    join(launch(runs, 1, one) + launch(runs, 2, two))
    return one, two


def results(directories, kind):
    one, two = directories
    return [torch.load(d / f"{kind}{r}.pt") for d, r in ((one, 0), (two, 0), (two, 1))]


def compare(numbers, expected, **tolerance):
    assert numbers.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(numbers[key], tensor, **tolerance)


@pytest.mark.parametrize("case", list(DDP_CASES))
def test_two_processes_have_the_losses_and_the_adapter_of_one(directories, case):
    one, first, second = (r[case] for r in results(directories, "replicated"))
    assert len(one[0]) in (STEPS, STEPS // 2)
    assert first[0] == pytest.approx(one[0], abs=2e-5)
    compare(first[1], one[1], atol=1e-4, rtol=1e-3)
    compare(second[1], first[1], atol=0, rtol=0)


@pytest.mark.parametrize("case", list(FSDP_CASES))
def test_sharded_processes_have_the_losses_and_the_adapter_of_one(directories, case):
    one, first, second = (r[case] for r in results(directories, "sharded"))
    far = 0.02 if case in ROUNDED else 1e-6
    assert first[0] == pytest.approx(one[0], abs=far)
    compare(first[1], one[1], atol=far, rtol=far)
    # What is trained: no number more than in one process.
    assert first[2] == second[2]
    assert [key.replace("_checkpoint_wrapped_module.", "") for key in first[2]] == one[
        2
    ]


@pytest.mark.parametrize("case", list(FSDP_CASES))
def test_interventions_compute_with_whole_float32_parameters(directories, case):
    for result in results(directories, "sharded")[1:]:
        _, _, _, lent, sharded, _ = result[case]
        assert sharded == {True}
        dtype = torch.bfloat16 if case == "rounded" else torch.float32
        assert lent == {("Parameter", dtype)}


@pytest.mark.parametrize("case", list(FSDP_CASES))
@torch.no_grad()
def test_what_sharded_processes_saved_is_loaded_by_one(directories, case):
    # After each had its own checkpoint back.
    first, second = (r[case][-1] for r in results(directories, "sharded")[1:])
    assert torch.equal(first, second)
    base = build_model().to(FSDP_CASES[case][0].get("dtype", torch.float32))
    model = PeftModel.from_pretrained(base, directories[1] / case).eval()
    ours = model(PROBE).logits.float()
    assert (ours - model.unload()(PROBE).logits.float()).abs().max() > 0.1
    if case in ROUNDED:
        torch.testing.assert_close(ours, first, atol=0.2, rtol=0.02)
    else:
        torch.testing.assert_close(ours, first, atol=1e-5, rtol=1e-5)
