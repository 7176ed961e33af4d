"""Several processes train in two parts as one does as a whole, and keep what they
computed from one epoch to the next."""

import pytest
import torch
from distributed_runs import STEPS, join, launch
from frozen_prompt_runs import CASES, EPOCHS, train_in_two_parts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process and two have left, each after all trainings."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    runs = [train_in_two_parts]
    join(launch(runs, 1, one) + launch(runs, 2, two))
    files = one / "frozen0.pt", two / "frozen0.pt", two / "frozen1.pt"
    return [torch.load(file) for file in files]


@pytest.mark.parametrize("case", list(CASES))
def test_losses_and_adapter_are_those_of_one_process_as_a_whole(results, case):
    expected, numbers, _ = results[0][case, False]
    assert len(expected) == EPOCHS * STEPS
    for process in results:
        losses, got, _ = process[case, True]
        assert losses == pytest.approx(expected, abs=2e-5)
        torch.testing.assert_close(got, numbers, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("case", list(CASES))
def test_the_second_epoch_finds_what_the_first_has_kept(results, case):
    for rank, process in enumerate(results[1:]):
        first, second = process[case, True][2][:STEPS], process[case, True][2][STEPS:]
        assert sum(first) > 0
        is_kept = CASES[case][2][rank]
        # Another process needs passes of sharded layers: of a token, for nothing.
        assert sum(second) <= 1 if is_kept else sum(second) > 1
