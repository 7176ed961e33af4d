"""Accuracy on a pretrained model (benchmarks/quality/), with a toy and no downloads."""

import json
import random

import pytest
import torch
from chat_templates import build_byte_tokenizer
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality import costs, measuring, plots, training
from benchmarks.quality.costs import Cost
from benchmarks.quality.measuring import Measurement
from benchmarks.quality.methods import Method
from benchmarks.quality.results import Results, Run, read, report
from benchmarks.quality.training import Training, row_of, train
from examples.real.answers import accuracy, turns_of
from examples.real.tasks import Task, first_of

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FRUIT = [[("apple?", "yes")], [("stone?", "no")], [("pear?", "yes")]]


@pytest.fixture(scope="module")
def tokenizer():
    specials = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
    return build_byte_tokenizer(specials, "<|im_end|>", CHATML)


@pytest.fixture
def toy(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).bfloat16().eval()


def test_only_answers_and_their_ends_are_labelled(tokenizer):
    conversation = [("one", "two"), ("three", "four")]
    row = row_of(turns_of(tokenizer, conversation))
    messages = [
        {"role": role, "content": content}
        for turn in conversation
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(row["input_ids"]) == text.rstrip("\n")
    labelled = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(labelled) == "two<|im_end|>four<|im_end|>"
    kept = zip(row["input_ids"], row["labels"], strict=True)
    assert all(label in (-100, i) for i, label in kept)


def test_accuracy_asks_every_turn_after_the_right_answers(tokenizer, toy, monkeypatch):
    asked = []

    def generate(input_ids, attention_mask, **_):
        assert toy.lm_head.weight.requires_grad
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            asked.append(tokenizer.decode(ids[mask.bool()]))
        answers = [" B" if "c" in text else "a" for text in asked[-len(input_ids) :]]
        ids = tokenizer(answers, padding=True, return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, ids], dim=1)

    monkeypatch.setattr(toy, "generate", generate)
    toy.requires_grad_(False)
    task = Task("toy", [], [], [], first_of("a", "b"))
    found = [[("q", "a"), ("c", "b")], [("long question", "b")]]
    assert accuracy(toy, tokenizer, task, found, batch=2) == pytest.approx(200 / 3)
    assert not toy.lm_head.weight.requires_grad
    ends = [text.removesuffix("<|im_end|>\n<|im_start|>assistant\n") for text in asked]
    user = "<|im_start|>user\n"
    assert sorted(ends, key=len) == [
        f"{user}q",
        f"{user}long question",
        f"{user}q<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n{user}c",
    ]


def test_runs_are_kept_and_only_missing_ones_are_made(
    tokenizer, toy, tmp_path, monkeypatch
):
    loreft = {"positions": "l2", "rank": 2}
    lora = {"r": 2, "target_modules": ["q_proj"]}
    made_up = {
        "LoReFT": Method(loreft, (1e-3, 1e-2)),
        "LoRA": Method(lora, (1e-4, 1e-3)),
    }
    monkeypatch.setattr(measuring, "METHODS", made_up)
    right = {1e-3: 50.0, 1e-2: 60.0, 1e-4: 40.0}
    monkeypatch.setattr(measuring, "accuracy", lambda *_, **__: right[rates[-1]])
    rates = [1e-4]

    def trained(base, tokenizer, task, training):
        rates.append(training.learning_rate)
        return train(base, tokenizer, task, training)

    monkeypatch.setattr(measuring, "train", trained)
    task = Task("fruit", FRUIT, FRUIT[:1], FRUIT)
    path, settings = tmp_path / "results.json", {"steps": 2, "batch": 2}
    before = {name: p.clone() for name, p in toy.named_parameters()}
    made = Results(settings)
    measurement = Measurement(made, path, toy, tokenizer, {"fruit": task}.__getitem__)
    plan = (["fruit"], ["LoReFT", "LoRA"], 2)
    measurement.run(*plan)
    assert all(torch.equal(p, before[name]) for name, p in toy.named_parameters())
    assert read(path, settings).runs == made.runs
    # Two rates with the first seed, and the better one with the second.
    found = [(r.method, r.learning_rate, r.seed, r.validation) for r in made.runs]
    assert found == [
        ("LoReFT", 1e-3, 0, 50),
        ("LoReFT", 1e-2, 0, 60),
        ("LoReFT", 1e-2, 1, None),
        ("LoRA", 1e-4, 0, 40),
        ("LoRA", 1e-3, 0, 50),
        ("LoRA", 1e-3, 1, None),
    ]
    parameters = {run.method: run.parameters for run in made.runs}
    assert parameters == {"LoReFT": 2 * (2 * 2 * 32 + 2), "LoRA": 2 * 2 * 2 * 32}
    del made.runs[2]
    kept = list(made.runs)
    measurement.run(*plan)
    assert made.runs[:-1] == kept and len(made.runs) == 6


def test_a_rate_that_validation_passes_over_is_not_tested(toy, tokenizer, monkeypatch):
    task = Task("fruit", FRUIT, FRUIT[:1], FRUIT)
    scores = iter([None, 60.0, 1.0, 50.0])

    def accuracy(*_, **__):
        return next(scores)

    monkeypatch.setattr(measuring, "accuracy", accuracy)
    made_up = {"LoReFT": Method({"positions": "l2", "rank": 1}, (1e-3, 1e-2))}
    monkeypatch.setattr(measuring, "METHODS", made_up)
    made = Results({"steps": 1, "batch": 2})
    monkeypatch.setattr(made, "write", lambda path: None, raising=False)
    Measurement(made, None, toy, tokenizer, {"fruit": task}.__getitem__).run(
        ["fruit"], ["LoReFT"], 1
    )
    assert [run.test for run in made.runs] == [1.0, None]


def test_results_with_other_settings_are_not_added_to(tmp_path):
    path = tmp_path / "results.json"
    Results({"steps": 2, "rank": 8}).write(path)
    assert {"versions", "hardware", "date"} < set(json.loads(path.read_text()))
    with pytest.raises(ValueError, match="results with another steps; name another "):
        read(path, {"steps": 3, "rank": 8})


def test_the_table_has_the_rate_that_validation_chose():
    def run(rate, seed, validation, test):
        losses = [1.0] * 60
        return Run("fruit", "LoReFT", rate, seed, 9, validation, test, 30.0, losses)

    runs = [run(2e-3, 1, None, 83), run(1e-3, 0, 60, 90), run(2e-3, 0, 70, 80)]
    table = report(Results({}, {"fruit": 12.5}, runs))
    assert "| fruit | none |  |  | 12.5 |  |  |  |" in table
    line = "| LoReFT | 9 | 0.002 | 81.5 | 80.0 to 83.0 | 80.0, 83.0 | 0.50 |"
    assert line in table and "90" not in table


def test_plots_have_a_panel_for_each_task(tmp_path):
    def run(task, method, test):
        return Run(task, method, 1e-3, 0, 1000, 50, test, 30.0, [2.0, 1.0])

    runs = [run("fruit", "LoReFT l7", 80), run("stones", "LoRA r8", 70)]
    results = Results({}, {"fruit": 12.5, "stones": 50}, runs)
    paths = plots.write(results, tmp_path)
    assert len(paths) == 3
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_method_has_its_colour_where_others_were_not_run():
    def run(task, method):
        return Run(task, method, 1e-3, 0, 1000, 50, 80, 30.0, [2.0, 1.0])

    runs = [*(run("fruit", method) for method in plots.CURVES), run("nuts", "LoRA r8")]
    colours = dict[str, list[str]]()
    for task in ("fruit", "nuts"):
        axis = Figure().add_subplot()
        plots._curves(axis, Results({}, {}, runs), task)
        colours[task] = [
            line.get_color() for line in axis.lines if line.get_label() == "LoRA r8"
        ]
    assert colours["nuts"] == colours["fruit"]
    assert len(colours["nuts"]) == 1


def test_costs_are_ratios_within_rounds(tmp_path):
    found = [
        Cost("LoRA r8", 200, [2.0, 4.0], [10.0, 5.0], 80_000_000, 20_000),
        Cost("LoReFT l7", 20, [1.0, 1.0], [20.0, 20.0], 40_000_000, 2_000),
    ]
    costs.write(found, tmp_path / "costs.json")
    written = json.loads((tmp_path / "costs.json").read_text())["costs"]
    assert [Cost(**cost) for cost in written] == found
    line = (
        "| LoReFT l7 | 20 | 1.00 | 0.38 (0.25–0.50) | 40 | 2 | 20 | 3.00 (2.00–4.00) |"
    )
    assert line in costs.report(found)


def test_methods_take_turns_and_leave_the_base_as_it_was(tokenizer, toy, monkeypatch):
    made_up = {
        "LoReFT": Method({"positions": "l2", "rank": 2}),
        "LoReFT of higher rank": Method({"positions": "l2", "rank": 4}),
        "LoRA r8": Method({"r": 2, "target_modules": ["q_proj"]}),
    }
    before = {name: p.clone() for name, p in toy.named_parameters()}
    monkeypatch.setattr(costs, "METHODS", made_up)
    monkeypatch.setattr(costs, "_memory_of", lambda method, batch: 5 + batch)
    task = Task("fruit", FRUIT, FRUIT, FRUIT)
    monkeypatch.setattr(costs, "load", lambda name, answers: task)
    found = costs.measure(toy, tokenizer, 2, 2, ["LoReFT"])
    assert [cost.method for cost in found] == ["LoReFT", "LoRA r8"]
    for cost in found:
        assert len(cost.step_seconds) == len(cost.tokens_per_second) == 2
        assert cost.adapter > 4 * cost.parameters and cost.memory == 7
    assert all(torch.equal(p, before[name]) for name, p in toy.named_parameters())


@pytest.fixture
def pyreft(tokenizer, monkeypatch, tmp_path):
    """A method that pyreft trains, and the processes that run: answers are yes."""
    running = []

    class Stub:
        def __init__(self, python):
            assert python == "its python"
            running.append(self)

        def train(self, model, rows, **settings):
            self.trained = rows, settings
            found = {"cpu_seconds": 2.0, "losses": [1.0], "step_seconds": [3.0]}
            return {"parameters": 9, **found}

        def generate(self, prompts, most):
            return [tokenizer("yes")["input_ids"] for _ in prompts]

        def unload(self):
            running.remove(self)

    method = Method({"positions": "f1+l2", "rank": 2}, (1e-3,), by_pyreft=True)
    monkeypatch.setattr(measuring, "METHODS", {"pyreft": method})
    monkeypatch.setattr(training, "PyreftModel", Stub)
    monkeypatch.setattr(training, "smollm2", lambda: tmp_path)
    return method, running


def test_pyreft_trains_on_the_tokens_and_settings_of_all_methods(tokenizer, pyreft):
    method, running = pyreft
    task = Task("fruit", FRUIT, FRUIT[:1], FRUIT)
    settings = Training(method, 1e-3, 3, steps=2, batch=1, pyreft="its python")
    trained = train(None, tokenizer, task, settings)
    rows, sent = running[0].trained
    chosen = random.Random(3).sample(FRUIT, 2)
    assert rows == [turn for found in chosen for turn in turns_of(tokenizer, found)]
    assert sent == {
        "learning_rate": 1e-3,
        "seed": 3,
        "steps": 2,
        "batch": 1,
        "positions": "f1+l2",
        "rank": 2,
    }
    assert (trained.parameters, trained.cpu_seconds) == (9, 2.0)


def test_answers_of_pyreft_are_judged_as_all_others(tokenizer, pyreft, tmp_path):
    task = Task("fruit", FRUIT, FRUIT[:1], FRUIT)
    made = Results({"steps": 2, "batch": 1}, {"fruit": 0.0})
    tasks = {"fruit": task}.__getitem__
    path = tmp_path / "results.json"
    Measurement(made, path, None, tokenizer, tasks, "its python").run(
        ["fruit"], ["pyreft"], 1
    )
    (run,) = made.runs
    assert run.validation == 100 and run.test == pytest.approx(200 / 3)
    assert run.parameters == 9 and pyreft[1] == []


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        (None, "pyreft has no environment here; make bench-environments makes it"),
        ("its python", "pyreft trains on one prompt a sample, and these have several"),
    ],
)
def test_pyreft_is_left_out_where_it_cannot_train(pyreft, capsys, python, reason):
    turns = [[("one", "two"), ("three", "four")]]
    task = Task("talk", turns, turns, turns)
    made = Results({}, {"talk": 0.0})
    Measurement(made, None, None, None, {"talk": task}.__getitem__, python).run(
        ["talk"], ["pyreft"], 1
    )
    assert f"pyreft is left out of talk: {reason}" in capsys.readouterr().out
    assert made.runs == [] and pyreft[1] == []
