"""What a training leaves beside its adapter for those who compare it."""

import json
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from axolotl_reft.training.run_record import CONFIG_RECORD, RunRecord

STATE = "trainer_state.json"


@pytest.fixture
def training(tmp_path):
    out = tmp_path / "out"
    arguments = SimpleNamespace(output_dir=str(out))
    state = TrainerState(global_step=2, max_steps=2)
    return RunRecord({"loreft": {"rank": 2}, "seed": 3}), arguments, state, out


def test_settings_are_written_first_and_the_state_at_the_end(training):
    callback, arguments, state, out = training
    callback.on_train_begin(arguments, state, None)
    settings = json.loads((out / CONFIG_RECORD).read_text())
    assert settings == {"loreft": {"rank": 2}, "seed": 3}
    assert not (out / STATE).exists()
    state.log_history.append({"train_runtime": 5.0, "step": 2})
    callback.on_train_end(arguments, state, None)
    found = json.loads((out / STATE).read_text())
    assert found["global_step"] == 2
    assert found["log_history"] == [{"train_runtime": 5.0, "step": 2}]


def test_an_earlier_trainings_state_does_not_stay(training):
    callback, arguments, state, out = training
    callback.on_train_begin(arguments, state, None)
    callback.on_train_end(arguments, state, None)
    callback.on_train_begin(arguments, state, None)
    assert not (out / STATE).exists()


def test_other_processes_write_nothing(training):
    callback, arguments, state, out = training
    state.is_world_process_zero = False
    callback.on_train_begin(arguments, state, None)
    callback.on_train_end(arguments, state, None)
    assert not out.exists()
