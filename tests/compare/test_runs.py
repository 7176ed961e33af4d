"""What is read of a run's directory, and of one that is not as a training leaves it."""

import json
import os
import shutil

import pytest
import torch
from compared_runs import (
    CONFIG,
    STATE,
    WEIGHTS,
    checkpoint,
    finish,
    save_lora,
    save_loreft,
    swept,
    write_json,
    write_state,
)
from safetensors.torch import load_file, save_file

from axolotl_reft.compare.runs import find_runs, read_run
from axolotl_reft.training.run_record import CONFIG_RECORD

# 3 layers, R and W of rank 4 and width 32, and a bias.
PARAMETERS = 3 * (2 * 4 * 32 + 4)


@pytest.fixture
def out(tmp_path):
    return finish(save_loreft(tmp_path / "out"), steps=12)


def test_a_finished_run(out):
    run = read_run(out)
    assert run.state == "finished" and run.notes == [] and run.as_written
    assert run.adapter["method"] == "LOREFT" and run.adapter["rank"] == 4
    assert run.training["learning_rate"] == 0.001
    assert run.training["loreft.frozen_prompt"] == "auto"
    assert not {"loreft.rank", "output_dir", "adapter"} & run.training.keys()
    assert run.parameters == PARAMETERS
    assert run.bytes == (out / WEIGHTS).stat().st_size
    assert (run.steps, run.seconds) == (12, 83.0)
    assert run.loss == 8 and run.mean_loss == pytest.approx(12.5)
    assert run.eval_loss == run.best_eval_loss == -2
    assert run.scores == {"eval_ppl": -4} and run.lower_is_better == {"eval_ppl"}
    assert run.edit_size == pytest.approx(1.2 * 1.5)
    assert run.curves["eval_loss"] == {n: 10 - n for n in range(2, 13, 2)}


def test_parameters_of_a_lora_are_those_it_trained(tmp_path):
    run = read_run(save_lora(tmp_path / "lora"))
    # q of 32 × 32, v of 32 × 16 in 3 layers; embeddings are saved beside them.
    assert run.parameters == 3 * 2 * (32 + 32 + 32 + 16)
    assert run.adapter["rank"] == 2
    assert run.adapter["target_modules"] == "q_proj, v_proj"
    assert any("embed" in key for key in load_file(tmp_path / "lora" / WEIGHTS))
    assert run.state == "no trainer state" and len(run.notes) == 2
    head = save_lora(tmp_path / "head", modules_to_save=["lm_head"])
    assert read_run(head).parameters == run.parameters + 64 * 32


def test_without_a_record_the_config_that_axolotl_logged_is_read(out):
    (out / CONFIG_RECORD).unlink()
    logged = json.dumps(CONFIG | {"seed": 3, "batch_size": 8}, indent=2)
    early = json.dumps(CONFIG | {"seed": 2}, indent=2)
    (out / "debug.log").write_text(f"a\nconfig:\n{early}\nb\nconfig:\n{logged}\nc\n")
    run = read_run(out)
    assert run.training["seed"] == 3 and not run.as_written and run.notes == []
    (out / "debug.log").unlink()
    assert read_run(out).notes == [
        "no record of its config: only the adapter's settings show"
    ]


def test_a_run_that_did_not_end_is_that_of_its_newest_checkpoint(out):
    checkpoint(out, 2, of=20)
    checkpoint(out, 10, of=20, adapter=save_loreft(out.parent / "other", seed=2))
    for name in (STATE, WEIGHTS):
        (out / name).unlink()
    run = read_run(out)
    assert run.state == "unfinished: saved at 10 of 20 steps" and run.notes == []
    assert run.loss == 10 and run.steps == 10 and run.seconds is None
    assert run.parameters == PARAMETERS


def test_an_older_adapter_beside_newer_checkpoints_has_its_own_losses(out):
    checkpoint(out, 2, of=20)
    checkpoint(out, 10, of=20, adapter=save_loreft(out.parent / "other", seed=2))
    (out / STATE).unlink()
    run = read_run(out)
    assert run.state == "stopped at 10 of 20 steps" and run.loss == 18
    assert run.notes == ["the saved adapter is that of step 2 of 10"]


def test_an_adapter_of_another_training_than_its_checkpoints_is_told(out):
    checkpoint(out, 12, of=12, adapter=save_loreft(out.parent / "other", seed=2))
    assert read_run(out).notes == [
        "the adapter equals no checkpoint; losses may be of another training"
    ]
    shutil.rmtree(out / "checkpoint-12")
    checkpoint(out, 12, of=12)
    assert read_run(out).notes == []


def test_the_best_checkpoint_loaded_at_the_end_is_the_one_told(out):
    other = save_loreft(out.parent / "other", seed=2)
    checkpoint(out, 6, of=12)
    checkpoint(out, 12, of=12, adapter=other)
    run = read_run(out)
    assert (run.steps, run.eval_loss, run.best_eval_loss) == (12, 4, -2)
    assert run.loss == 14 and run.seconds == 83.0
    assert run.notes == ["the saved adapter is that of step 6 of 12"]


def test_a_checkpoint_is_read_with_its_runs_config(out):
    run = read_run(checkpoint(out, 2, of=12))
    assert run.state == "checkpoint at 2 of 12 steps"
    assert run.training["learning_rate"] == 0.001 and run.loss == 18


@pytest.mark.parametrize(
    ("state", "record", "told"),
    [
        ("finished", {}, "finished"),
        ("begun", {}, "unfinished: saved at 12 steps"),
        ("failed", {"error": "RuntimeError: no memory"}, "failed: RuntimeError: no"),
    ],
)
def test_a_sweeps_record_says_how_a_run_ended(out, state, record, told):
    swept(out, state, **record)
    assert read_run(out).state.startswith(told)


def test_a_run_that_failed_before_it_began_is_told_by_its_config(tmp_path):
    swept(tmp_path / "failed", "failed", error="ValueError: wrong")
    (run,) = find_runs([str(tmp_path / "failed")])
    assert run.state == "failed: ValueError: wrong" and run.parameters is None
    assert run.settings["rank"] == 4 and run.settings["method"] == "LOREFT"
    assert run.settings["learning_rate"] == 0.001


def test_an_evaluation_before_the_end_is_told(tmp_path):
    run = read_run(finish(save_loreft(tmp_path / "out"), steps=5))
    assert run.eval_loss == 6 and run.notes == ["eval_loss is of step 4 of 5"]


def test_a_diverged_training_is_told(out):
    write_state(out, 3, loss=float("nan"))
    assert "the training diverged" in read_run(out).notes[0]


def test_times_of_resumed_runs_are_told(out):
    finish(out, resume_from_checkpoint="checkpoint-2")
    assert read_run(out).notes == ["the time is that since it was resumed, if it was"]


@pytest.mark.parametrize("name", [STATE, WEIGHTS, CONFIG_RECORD])
def test_damaged_files_are_told_and_the_rest_is_read(out, name):
    (out / name).write_text("{")
    run = read_run(out)
    assert any(name in note or "damaged" in note for note in run.notes)
    assert run.adapter["rank"] == 4


def test_results_of_lm_eval_are_scores(out):
    results = {
        "letters": {
            "alias": "letters",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "sample_len": 4,
            "word_perplexity,none": 3.0,
            "acc,strict-match": 0.25,
        }
    }
    directions = {"letters": {"acc": True, "word_perplexity": False}}
    found = {"results": results, "higher_is_better": directions}
    file = write_json(out / "scores.json", found)
    write_json(out / "other.json", [1])
    run = read_run(out)
    del run.scores["eval_ppl"]
    assert run.scores == {
        "letters acc": 0.5,
        "letters word_perplexity": 3.0,
        "letters acc (strict-match)": 0.25,
    }
    assert run.lower_is_better == {"eval_ppl", "letters word_perplexity"}
    assert run.notes == []
    os.utime(file, (1, 1))
    assert read_run(out).notes == ["scores.json is older than the adapter"]


def test_a_directory_of_runs_is_read_without_their_checkpoints(tmp_path):
    for name in ("b", "a"):
        checkpoint(finish(save_loreft(tmp_path / "sweep" / name)), 4, of=4)
    (tmp_path / "sweep" / "prepared").mkdir()
    sweep, first = str(tmp_path / "sweep"), str(tmp_path / "sweep" / "a")
    runs = find_runs([sweep, first])
    assert [run.directory for run in runs] == [first, str(tmp_path / "sweep" / "b")]
    # An earlier training in the directory itself is one of them.
    finish(save_loreft(tmp_path / "sweep"))
    assert [run.directory for run in find_runs([sweep])][0] == sweep
    assert len(find_runs([sweep])) == 3


@pytest.mark.parametrize(("name", "got"), [("empty", "holds no adapter"), ("no", "is")])
def test_a_directory_without_a_run_is_refused(tmp_path, name, got):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"DIR: .*{name}' {got}.*; name the output_d"):
        find_runs([str(tmp_path / name)])


def test_tensors_of_an_untrained_module_are_not_counted(out):
    tensors = load_file(out / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(64, 32)
    save_file(tensors, out / WEIGHTS)
    assert read_run(out).parameters == PARAMETERS
