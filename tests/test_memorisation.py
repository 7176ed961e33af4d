"""The memorisation example's own parts, on a tiny random Llama."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import build_model

SCRIPT = Path(__file__).parent.parent / "examples" / "memorisation" / "memorise.py"
PROMPT = [1, 5, 9]
# The base says neither: not 3 after the prompt, nor 27 after both.
TARGET = [3, 27]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = spec_from_file_location("memorise", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("given", "recovered"),
    [
        ([7, 8, 9], 3),
        ([7, 8, 1], 2),
        ([1, 8, 9], 0),
        ([7, 1, 9], 1),
        ([7, 8], 2),
        ([7, 8, 9, 1], 3),
        ([], 0),
    ],
)
def test_counts_what_is_right_from_the_start(
    example: ModuleType, given: list[int], recovered: int
) -> None:
    assert example.count_recovered(given, [7, 8, 9]) == recovered


def test_only_the_target_is_trained(example: ModuleType) -> None:
    input_ids, labels = example.make_row(PROMPT, TARGET)
    assert input_ids.tolist() == [[1, 5, 9, 3, 27]]
    assert labels.tolist() == [[-100, -100, -100, 3, 27]]


def test_two_tokens_are_memorised_and_the_base_is_left_alone(
    example: ModuleType,
) -> None:
    base = build_model(num_hidden_layers=2).eval()
    before = base(input_ids=torch.tensor([PROMPT])).logits
    assert example.recall(base, PROMPT, TARGET) == 0
    assert example.recall(base, PROMPT + TARGET[:1], TARGET[1:]) == 0
    untrained, _ = example.memorise(base, PROMPT, TARGET, layer=0, steps=0)
    assert untrained == 0
    recovered, taken = example.memorise(base, PROMPT, TARGET, layer=0, steps=200)
    assert recovered == 2
    assert 0 < taken < 200
    assert torch.equal(base(input_ids=torch.tensor([PROMPT])).logits, before)
    assert example.recall(base, PROMPT, TARGET) == 0
