"""The demo's report, on an untrained adapter, and what `make demo` says around it."""

import json
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from documents import ROOT
from peft import get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from axolotl_reft import LoreftConfig

FOLDER = ROOT / "examples" / "tiny-llama"
FIRST = {"instruction": "a b c d mirror =", "output": "d c b a"}
OWN = [
    {"instruction": "a b c d copy =", "output": "a b c d"},
    {"instruction": "a b c d reverse =", "output": "d c b a"},
    {"instruction": "d b c a sort =", "output": "a b c d"},
    {"instruction": "a b c d next =", "output": "b c d e"},
]


@pytest.fixture
def report(monkeypatch, tmp_path):
    """The module, with a base and an adapter that were not trained."""
    monkeypatch.syspath_prepend(str(FOLDER))
    task, make_base, report = map(import_module, ("task", "make_base", "report"))
    tokenizer = task.make_tokenizer()
    torch.manual_seed(0)
    base = make_base.make_model(tokenizer)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = LoreftConfig(task_type="CAUSAL_LM", positions="f4+l8", rank=4)
    get_peft_model(base, config).save_pretrained(tmp_path / "out")
    for name, rows in (("test.jsonl", [FIRST]), ("base_test.jsonl", OWN)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(report, "BASE_DIR", tmp_path / "base")
    monkeypatch.setattr(report, "DATA_DIR", tmp_path)
    monkeypatch.setattr(report, "OUT_DIR", tmp_path / "out")
    yield report
    for name in ("task", "make_base", "pad_heads", "report"):
        sys.modules.pop(name, None)


def test_it_says_before_and_after_and_that_a_promise_is_not_kept(report, capsys):
    with pytest.raises(SystemExit, match="promise is not kept"):
        report.main()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("new task, before") for line in lines)
    after = next(line for line in lines if line.startswith("new task, after"))
    assert after.endswith("NOT KEPT")
    frozen = next(line for line in lines if line.startswith("base tasks, adapter dis"))
    assert "as it must be" in frozen


def test_it_says_of_what_the_adapters_share_is_one(report, capsys):
    with pytest.raises(SystemExit):
        report.main()
    text = capsys.readouterr().out
    assert "0.5782% of the model's" in text and "0.5749%" in text


def test_the_base_tasks_with_the_adapter_on_are_each_counted(report, capsys):
    right = [row["output"] for row in OWN]
    report.print_adapter_on([right[0], "wrong", *right[2:]], OWN)
    text = capsys.readouterr().out
    shares = {
        line.split()[-4]: line.split()[-3] for line in text.splitlines() if "%" in line
    }
    assert shares == {
        "on": "75.00%",
        "copy": "100.00%",
        "reverse": "0.00%",
        "sort": "100.00%",
        "next": "100.00%",
    }


def test_make_demo_says_what_it_does_first_and_what_is_next_at_the_end():
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "demo", "VENV=elsewhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    commands = done.stdout
    assert commands.index("minutes in all") < commands.index("-m venv elsewhere")
    assert commands.index("4.5 GB") < commands.index("-m venv elsewhere")
    steps = ("make_base.py", "axolotl train", "report.py", "axolotl inference")
    assert sorted(steps, key=commands.index) == list(steps)
    end = commands[commands.index("Your adapter is in examples/tiny-llama/out") :]
    assert ". elsewhere/bin/activate" in end
    assert "axolotl inference examples/tiny-llama/loreft.yml" in end


@torch.no_grad()
def test_the_base_for_vllm_computes_the_same_with_larger_heads(report):
    base = AutoModelForCausalLM.from_pretrained(report.BASE_DIR).eval()
    for name, parameter in base.named_parameters():
        if "proj" in name:  # attention that depends on positions
            parameter.mul_(8)
    padded = import_module("pad_heads").with_padded_heads(base, 32)
    ids = torch.randint(3, 36, (2, 40), generator=torch.Generator().manual_seed(0))
    assert padded.config.head_dim == 32
    assert_close(padded(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)


def test_make_demo_serving_names_what_must_come_first():
    done = subprocess.run(
        # Under make test, make would print which directory it is in.
        [
            "make",
            "--no-print-directory",
            "demo-serving",
            "DEMO=nowhere",
            "SERVING_VENV=nowhere",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stdout == (
        "The demo has not trained its adapter yet: run make demo first.\n"
    )


def test_the_words_of_getting_started_are_the_tiny_tokenizers(report):
    page = (ROOT / "docs" / "getting-started.md").read_text()
    rows = re.findall(r'^ *(\{"instruction": .*\})$', page, re.MULTILINE)
    assert len(rows) == 3
    tokenizer = sys.modules["task"].make_tokenizer()
    for row in map(json.loads, rows):
        ids = tokenizer(f"{row['instruction']} {row['output']}")["input_ids"]
        assert tokenizer.unk_token_id not in ids
