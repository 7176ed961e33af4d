"""The commands that load a model: in this process where that is what users run."""

import builtins
import csv
import json
import sys
from functools import partial

import gradio
import pytest
import torch
from axolotl.cli.inference import do_cli
from axolotl.cli.main import cli
from click.testing import CliRunner
from command_line import axolotl
from conftest import build_adapter
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from workspace import ANSWER, build_base, build_config, build_data, build_task

from axolotl_reft.plugin import evaluation, plugin, prompt_forms
from axolotl_reft.plugin.commands import reft

pytestmark = pytest.mark.slow

PROMPT = "c a b d :"
GREEDY = {"max_new_tokens": 5, "do_sample": False, "repetition_penalty": 1.1}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} : {% endfor %}"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A workspace with a random adapter in output_dir, far from the base's answers."""
    directory = tmp_path_factory.mktemp("commands")
    build_base(directory / "base")
    build_data(directory / "train.jsonl", 8, seed=0)
    build_data(directory / "test.jsonl", 4, seed=1)
    base = AutoModelForCausalLM.from_pretrained(directory / "base")
    adapter = build_adapter(base, positions="f2+l2", rank=4, tied_weights=False)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 5)
    adapter.save_pretrained(directory / "out")
    return build_config(
        directory,
        gradio_share=False,
        gradio_max_new_tokens=5,
        gradio_temperature=0.0001,
        max_steps=2,
        save_steps=1000,
    )


@pytest.fixture(scope="module")
def model(config):
    base = AutoModelForCausalLM.from_pretrained(config.parent / "base")
    return PeftModel.from_pretrained(base, config.parent / "out").eval()


@torch.no_grad()
def answer(model, text):
    """What the adapter says, which the base alone does not."""
    tokenizer = AutoTokenizer.from_pretrained(model.base_model.model.name_or_path)
    batch = tokenizer(text, return_tensors="pt")
    length = batch.input_ids.shape[1]
    told = model.generate(**batch, **GREEDY)[0, length:]
    with model.disable_adapter():
        assert not torch.equal(model.generate(**batch, **GREEDY)[0, length:], told)
    return " ".join(tokenizer.convert_ids_to_tokens(told))


def run(monkeypatch, *arguments):
    line = [str(argument) for argument in arguments] + ["--launcher", "python"]
    monkeypatch.setattr(sys, "argv", ["axolotl", *line])
    result = CliRunner().invoke(cli, line)
    assert result.exception is None, result.output[-3000:]
    return result.output


def test_other_launchers_train_too(config, monkeypatch):
    out = config.parent / "by-python"
    run(monkeypatch, "train", config, "--output-dir", out)
    assert (out / "adapter_model.safetensors").is_file()


def test_torchrun_trains_too(config):
    out = config.parent / "by-torchrun"
    axolotl("train", config, "--output-dir", str(out), launcher="torchrun")
    assert (out / "adapter_model.safetensors").is_file()


@torch.no_grad()
def test_evaluate_by_the_python_launcher(config, model, monkeypatch):
    run(monkeypatch, "evaluate", config)
    rows = list(csv.DictReader((config.parent / "out/eval_summary.csv").open()))
    got = next(float(row["validation"]) for row in rows if row["metric"] == "loss")
    tokenizer = AutoTokenizer.from_pretrained(config.parent / "base")
    end = tokenizer(ANSWER, add_special_tokens=False).input_ids + [2]
    losses = []
    for line in (config.parent / "test.jsonl").read_text().splitlines():
        prompt = tokenizer(json.loads(line)["instruction"]).input_ids
        labels = torch.tensor([[-100] * len(prompt) + end])
        losses.append(model(torch.tensor([prompt + end]), labels=labels).loss.item())
    assert got == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_gradio_answers_from_the_adapter(config, model, monkeypatch):
    launched = []
    monkeypatch.setattr(
        gradio.Interface, "launch", lambda page, **settings: launched.append(page)
    )
    run(monkeypatch, "inference", config, "--gradio")
    told = list(launched[0].fn(PROMPT))[-1]
    assert " ".join(told.split()) == f"<s> {PROMPT} {answer(model, PROMPT)}"


@pytest.fixture
def warned(monkeypatch):
    told = []
    for module in (prompt_forms, plugin):
        monkeypatch.setattr(
            module.LOG, "warning", lambda form, *parts: told.append(form % parts)
        )
    return told


def alpaca(config):
    data = {"path": str(config.parent / "train.jsonl"), "ds_type": "json"}
    return build_config(
        config.parent,
        "alpaca.yml",
        datasets=[data | {"type": "alpaca", "split": "train"}],
        test_datasets=None,
        sequence_len=128,
    )


def test_inference_says_how_alpaca_prompts_are_given(config, monkeypatch, warned):
    path = alpaca(config)
    run(monkeypatch, "inference", path)
    assert [told.partition("Run ")[2] for told in warned] == [
        f"axolotl inference {path} --prompter AlpacaPrompter"
    ]
    run(monkeypatch, "inference", path, "--prompter", "AlpacaPrompter")
    run(monkeypatch, "inference", config)
    assert len(warned) == 1


def test_evaluate_without_data_for_it_says_so(config, monkeypatch, warned):
    run(monkeypatch, "evaluate", alpaca(config))
    assert len(warned) == 1 and "(train_loss), and no eval_loss" in warned[0]
    rows = list(csv.DictReader((config.parent / "out/eval_summary.csv").open()))
    losses = next(row for row in rows if row["metric"] == "loss")
    assert float(losses["training"]) and not losses["validation"]
    run(monkeypatch, "evaluate", alpaca(config), "--val-set-size", "0.25")
    run(monkeypatch, "evaluate", config)
    assert len(warned) == 1


def test_chat_answers_from_the_adapter_and_ends(config, model, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(config.parent / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(config.parent / "chat")
    path = build_config(
        config.parent,
        "chat.yml",
        tokenizer_config=str(config.parent / "chat"),
        chat_template="tokenizer_default",
    )
    typed = iter(["/set temperature 0", "/set max_new_tokens 5", "c a b d", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda prompt="": next(typed))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "argv", ["axolotl", str(path)])
    do_cli(str(path), chat=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert answer(model, PROMPT) in shown
    assert next(typed, None) is None


def score(source, tasks, *options):
    line = ["lm-eval", str(source), "--tasks", "letters", "--include-path", str(tasks)]
    return CliRunner().invoke(reft, [*line, *map(str, options)])


def test_a_config_and_its_adapters_directory_score_alike(config, tmp_path):
    build_task(tmp_path / "tasks")
    found = []
    for name, source in (("config", config), ("directory", config.parent / "out")):
        file = tmp_path / f"{name}.json"
        result = score(source, tmp_path / "tasks", "--output", file)
        assert result.exception is None, result.output[-3000:]
        assert "|letters|" in result.output
        found.append(json.loads(file.read_text())["results"])
    assert found[0] == found[1]


def test_a_file_of_scores_is_not_overwritten(config, tmp_path):
    file = tmp_path / "scores.json"
    file.write_text("kept")
    result = score(config, tmp_path, "--output", file)
    assert "exists already; name another file" in result.output
    assert file.read_text() == "kept"


def test_a_task_without_prompts_stops_before_the_base_loads(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluation, "LoreftLM", None)
    # Reading lm_eval's thousands of tasks takes 5 s each time.
    manager = partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(evaluation, "TaskManager", manager)
    build_task(tmp_path / "tasks", "loglikelihood_rolling")
    result = score(config.parent / "out", tmp_path / "tasks")
    assert "such texts have no prompt" in result.output
    (tmp_path / "none").mkdir()
    result = score(config.parent / "out", tmp_path / "none")
    assert "lm_eval knows no task 'letters'" in result.output


def test_axolotls_lm_eval_fails_and_writes_nothing(config):
    path = build_config(config.parent, "lm.yml", lm_eval_tasks=["arc_easy"])
    before = {file.name for file in (config.parent / "out").iterdir()}
    assert "CalledProcessError" in axolotl("lm-eval", path, check=False)
    assert {file.name for file in (config.parent / "out").iterdir()} == before
