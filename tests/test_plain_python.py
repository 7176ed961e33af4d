"""The example without axolotl runs, and so does each snippet of its page."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model
from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig, SFTTrainer
from workspace import build_tokenizer

from axolotl_reft import LoreftConfig

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples/plain-python/train.py"
PAGE = (ROOT / "docs/plain-python.md").read_text()
SNIPPETS = re.findall(r"## (.*?)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE, re.DOTALL)


TRAINERS = ["transformers", "trl"]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A directory for each trainer's output, and what the script printed with each,
    one after the other in a process."""
    folder = tmp_path_factory.mktemp("script")
    code = (
        "import runpy, sys\n"
        f"for trainer in {TRAINERS}:\n"
        "    print('with:', trainer)\n"
        f"    output = f'{folder}/{{trainer}}'\n"
        "    sys.argv[1:] = ['--trainer', trainer, '--output', output]\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "    print('axolotl imported:', 'axolotl' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _, *printed = re.split(r"^with: \w+$", done.stdout, flags=re.MULTILINE)
    return folder, dict(zip(TRAINERS, printed, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_script_learns(scripts, trainer):
    folder, printed = scripts[0], scripts[1][trainer]
    assert re.search(r"^after: ?animal", printed, re.MULTILINE), printed
    assert "from a random model" in printed
    # The adapter is of use afterwards: its base is still where it says.
    settings = json.loads((folder / trainer / "adapter_config.json").read_text())
    base = Path(settings["base_model_name_or_path"])
    assert base == folder / f"{trainer}-base" and (base / "config.json").is_file()
    assert not re.search(r"^before: ?animal", printed, re.MULTILINE)
    assert "axolotl imported: False" in printed
    assert "adapter_config.json" in printed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    runpy.run_path(str(SCRIPT))["build_tiny_model"](directory / "base")
    return directory


def test_there_are_six_snippets():
    assert [title for title, _ in SNIPPETS] == [
        "transformers' Trainer",
        "TRL's SFTTrainer",
        "TRL's other trainers",
        "Using it",
        "How strongly",
        "One prompt, several answers",
        "On a base in 4 bits",
    ]


@pytest.mark.parametrize("number", range(7))
def test_the_snippets_run(tiny, monkeypatch, number):
    monkeypatch.chdir(tiny)
    names = {}
    code = SNIPPETS[number][1].replace("meta-llama/Llama-3.2-1B", str(tiny / "base"))
    # As the page says for a machine without a GPU.
    code = code.replace("num_train_epochs=3", "num_train_epochs=3, use_cpu=True")
    exec(code, names)
    saved = "adapter-dpo" if number == 2 else "adapter"
    assert (tiny / saved / "adapter_config.json").is_file()
    if number == 6:
        kinds = {type(m).__name__ for m in names["base"].modules()}
        assert "Linear4bit" in kinds
        assert isinstance(names["model"], PeftModel)
        assert {
            p.dtype for n, p in names["model"].named_parameters() if "intv_" in n
        } == {torch.float32}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding_free": True, "max_length": None},
        {"packing": True, "max_length": 32},
    ],
)
def test_sfttrainers_batches_edit_the_prompts(tmp_path, settings):
    """Padded, padding-free and packed, the same tokens of each sample are edited."""
    tokenizer = build_tokenizer()
    rows = [
        {"prompt": "a b c d e :", "completion": " m"},
        {"prompt": "f g :", "completion": " n m"},
    ]
    defaults = {
        "output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "max_steps": 1,
        "per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    trainer = SFTTrainer(
        build_model(vocab_size=len(tokenizer), pad_token_id=0),
        SFTConfig(**defaults | settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoreftConfig(task_type="CAUSAL_LM", positions="f1+l1"),
    )
    edited = set()
    backbone = trainer.model.get_base_model().model
    layer = backbone.layers[0]

    def note(module, args, kwargs):
        note.ids = kwargs["input_ids"]

    def read(*_):
        prefix, suffix = layer.prompts("default").edited(
            layer.specs["default"].positions
        )
        for mask in (prefix, suffix):
            edited.update(tokenizer.convert_ids_to_tokens(note.ids[mask].tolist()))

    backbone.register_forward_pre_hook(note, with_kwargs=True)
    layer.register_forward_pre_hook(read)
    trainer.train()
    assert edited == {"<s>", ":"}
