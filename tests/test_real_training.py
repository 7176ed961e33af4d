"""Training and scoring of examples/real/, without axolotl's training."""

from pathlib import Path

import pytest
import yaml

from examples.real import score, settings, train
from examples.real.answers import Answer
from examples.real.score import Scored

CONFIG = {
    "base_model": "real/smollm2",
    "output_dir": "real/out/smollm2-lora",
    "datasets": [{"path": "real/data/linguistic-mappings/train.jsonl"}],
    "bf16": False,
}


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "smollm2-lora.yml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_a_config_is_taken_as_it_is_unless_something_is_replaced(config):
    assert settings.adapted(config, None, None) == config
    assert settings.adapted(config, "smollm2", "linguistic-mappings") == config


def test_a_base_and_a_task_are_replaced_and_nothing_else(config):
    path = settings.adapted(config, "gemma3", "social-iqa")
    assert path == Path("real/out/gemma3-lora-social-iqa/gemma3-lora.yml")
    assert yaml.safe_load(path.read_text()) == CONFIG | {
        "base_model": "real/gemma3",
        "output_dir": "real/out/gemma3-lora-social-iqa",
        "datasets": [{"path": "real/data/social-iqa/train.jsonl"}],
    }
    assert settings.task_name(settings.read(path)) == "Social IQa"
    # Another run's adapter is not written over.
    other = settings.adapted(config, "gemma3", None)
    assert (
        settings.read(other)["output_dir"] == "real/out/gemma3-lora-linguistic-mappings"
    )


def test_a_config_of_other_data_is_refused():
    given = CONFIG | {"datasets": [{"path": "mine/train.jsonl"}]}
    with pytest.raises(
        ValueError, match="mine/train.jsonl is no task's data; name the"
    ):
        settings.task_name(given)


def axolotl(folder: Path, monkeypatch, script: str) -> None:
    """Put a command axolotl first on the path."""
    command = folder / "axolotl"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_training_shows_steps_and_losses_only(config, monkeypatch, capsys):
    progress = r"10/60 [01:02<05:00]\r 10/60 [01:02<05:00]"
    shown = "{'loss': '0.5', 'grad_norm': '1e-3'}"
    axolotl(
        config.parent,
        monkeypatch,
        f'echo noise; echo "$@" > given; printf \'{progress}\\n\'; echo "{shown}" >&2',
    )
    train.train(config, ["--max-steps", "60"])
    assert Path("given").read_text() == f"train {config} --max-steps 60\n"
    assert capsys.readouterr().out == (
        f"\n$ axolotl train {config} --max-steps 60\n"
        "Its output is in real/out/smollm2-lora/debug.log.\n"
        "  step 10 of 60, after 01:02: loss 0.5\n"
    )


def test_a_failed_training_shows_its_end_and_stops(config, monkeypatch, capsys):
    lines = "seq 100; echo the reason >&2; exit 3"
    axolotl(config.parent, monkeypatch, lines)
    with pytest.raises(
        SystemExit, match="axolotl train failed; all that it wrote is in"
    ):
        train.train(config, [])
    written = capsys.readouterr().out
    assert written.rstrip().endswith("100\nthe reason") and "\n50\n" not in written


def test_other_options_are_axolotls(config, monkeypatch):
    trained, reported = [], []
    monkeypatch.setattr(train, "train", lambda *given: trained.append(given))
    monkeypatch.setattr(train, "report", lambda *given: reported.append(given))
    train.main([str(config), "--task", "social-iqa", "--max-steps", "9", "--mo=x"])
    (written,) = reported[0][0]
    assert written.parent.name == "smollm2-lora-social-iqa"
    assert trained == [(written, ["--max-steps", "9", "--mo=x"])]


@pytest.mark.parametrize(
    "given", [["--output-dir", "x"], ["--base-model=x"], ["--bf16", "true"]]
)
def test_what_scoring_reads_from_the_config_is_no_option(
    given, config, monkeypatch, capsys
):
    monkeypatch.setattr(train, "train", lambda *given: None)
    monkeypatch.setattr(train, "report", lambda *given: None)
    with pytest.raises(SystemExit):
        train.main([str(config), *given])
    assert "scoring reads it from the config; set it there" in capsys.readouterr().err


@pytest.mark.parametrize("main", [train.main, score.main])
def test_a_config_that_is_not_there_is_told(main, capsys):
    with pytest.raises(SystemExit):
        main(["nope.yml"])
    assert "argument config: there is no file 'nope.yml'" in capsys.readouterr().err


def answered(*right: bool) -> list[Answer]:
    return [Answer(f"q{n}", f"a{n}\n", f"b{n}", is_) for n, is_ in enumerate(right)]


def test_the_table_and_the_answers_name_each_adapter():
    rows = [
        Scored("toy", "none", answered(False, False)),
        Scored("toy", "smollm2-lora", answered(False, True), 1234, 56.7),
    ]
    assert score.table(rows).splitlines()[2:] == [
        "| toy | none |  | 0.0 % |  |",
        "| toy | smollm2-lora | 1,234 | 50.0 % | 57 s |",
    ]
    assert score.examples(rows, 2).splitlines() == [
        "",
        "q0",
        "  expected      b0",
        "  none          a0   (wrong)",
        "  smollm2-lora  a0   (wrong)",
        "",
        "q1",
        "  expected      b1",
        "  none          a1   (wrong)",
        "  smollm2-lora  a1",
    ]


def test_an_adapter_that_is_not_there_is_not_scored(config):
    with pytest.raises(ValueError, match="no adapter; train it first: axolotl train "):
        score.score_adapter(config)


def test_configs_of_several_tasks_are_not_in_one_table(config):
    other = settings.adapted(config, None, "social-iqa")
    with pytest.raises(
        ValueError, match="several tasks or bases .*Social IQa on real/"
    ):
        score.report([config, other], 0)
