"""``loreft: frozen_prompt`` in trainings of axolotl: the same losses, and the log."""

import json
import logging
import re

import pytest
import torch
import training
from axolotl.cli.evaluate import do_cli as evaluate_cli
from axolotl.cli.train import do_cli as train_cli
from forks import run_forked
from plugin.test_args import validated
from plugin.test_training_settings import adapter_numbers
from training import train
from workspace import build_config, build_workspace

from axolotl_reft.tuner.model import hooks_of
from axolotl_reft.tuner.partial_forward import PartialForward

BLOCK = {"positions": "l2", "rank": 4}
# Packed in this process, and by no pool of others.
PACKED = {
    "sample_packing": True,
    "sample_packing_sequentially": True,
    "micro_batch_size": 2,
    "sequence_len": 64,
    "attn_implementation": "sdpa",
}
TRAININGS = {
    "as it comes": {},
    "all logits": {"loreft_labelled_logits": False},
    "packed": PACKED,
    "checkpointed": {"gradient_checkpointing": True},
    "reentrant checkpoints": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


def read_with_positions(file, read=training.read_data):
    """As axolotl reads data that it packs, whose mask it drops then."""
    return read(file).map(lambda row: {"position_ids": list(range(len(row["labels"])))})


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return build_workspace(tmp_path_factory.mktemp("frozen"))


@pytest.fixture
def parts(monkeypatch):
    """Numbers of samples and of preambles of each forward in two parts."""
    seen = []
    forward = PartialForward.in_two_parts

    def noted(self, parts, *args):
        seen.append((len(parts.batch.samples), len(parts.preambles)))
        return forward(self, parts, *args)

    monkeypatch.setattr(PartialForward, "in_two_parts", noted)
    return seen


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"frozen_prompt": "yes"}, "frozen_prompt: 'yes' is unknown; write auto, true"),
        ({"frozen_prompt": 1}, "frozen_prompt: 1 is unknown"),
        ({"frozen_prompt": True, "positions": "f7+l7"},
         r"frozen_prompt: true needs positions: l<m>, and positions: f7\+l7 edits the "
         "beginning of the prompt; use frozen_prompt: auto, or l7"),
        ({"frozen_prompt": True, "positions": "all"}, "positions: all edits the begin"),
        ({"frozen_prompt_cache": "much"}, "'much' is not a size; write for example 8"),
        ({"frozen_prompt_cache": 8}, "frozen_prompt_cache: 8 is not a size"),
        ({"frozen_prompt_cache": -1}, "frozen_prompt_cache: -1 is not a size"),
        ({"frozen_prompt_cache": True}, "frozen_prompt_cache: True is not a size"),
        ({"frozen_prompt_cache": {"disk": "8GB"}}, "'disk': '8GB'} is not a size"),
        ({"frozen_promt": True}, "Did you mean 'frozen_prompt'"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused(block, message):
    with pytest.raises(ValueError, match=message):
        validated(loreft=block)


@pytest.mark.parametrize("cache", [0, "0", "8GB", "1.5 gb", {"device": "8GB"}, None])
@pytest.mark.parametrize("frozen_prompt", ["auto", True, False, None])
def test_good_settings_are_validated_twice_alike(frozen_prompt, cache):
    block = {"frozen_prompt": frozen_prompt, "frozen_prompt_cache": cache}
    once = validated(loreft={"positions": "l7", **block}).loreft
    assert once.frozen_prompt == ("auto" if frozen_prompt is None else frozen_prompt)
    assert validated(loreft=once.to_dict()).loreft == once


@pytest.mark.parametrize("name", list(TRAININGS))
def test_the_losses_are_those_of_the_plain_forward(
    config, tmp_path, parts, monkeypatch, name
):
    if name == "packed":
        monkeypatch.setattr(training, "read_data", read_with_positions)
    runs = []
    for frozen_prompt in (False, True):
        del parts[:]
        model, losses = train(
            config,
            4,
            evaluates=True,
            eval_steps=4,
            dataloader_num_workers=0,
            loreft={**BLOCK, "frozen_prompt": frozen_prompt},
            output_dir=str(tmp_path / str(frozen_prompt)),
            **TRAININGS[name],
        )
        runs.append((losses, adapter_numbers(model)))
    (expected, numbers), (losses, got) = runs
    assert len(losses) >= 5 and len(parts) >= 5
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(got, numbers, atol=1e-4, rtol=1e-3)
    if name == "packed":
        assert all(samples > 2 for samples, _ in parts[:4])


def test_the_settings_are_not_the_adapters(config, tmp_path):
    saved = []
    for frozen_prompt in (False, True):
        output = tmp_path / str(frozen_prompt)
        block = {**BLOCK, "frozen_prompt": frozen_prompt, "frozen_prompt_cache": "1MB"}
        train(config, 1, loreft=block, output_dir=str(output))
        saved.append(json.loads((output / "adapter_config.json").read_text()))
    assert saved[0] == saved[1]
    assert not any(key.startswith("frozen") for key in saved[0])


def test_a_resumed_training_has_the_same_losses(config, tmp_path, parts):
    block = {**BLOCK, "frozen_prompt": True}

    def run(name, **changes):
        output = str(tmp_path / name)
        return train(config, 6, loreft=block, output_dir=output, **changes)

    whole, losses = run("out", save_steps=3)
    del parts[:]
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    resumed, later = run("again", resume_from_checkpoint=checkpoint)
    assert later == pytest.approx(losses, rel=1e-6) and len(parts) >= 3
    torch.testing.assert_close(
        adapter_numbers(resumed), adapter_numbers(whole), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"frozen_prompt": True}, "computed without gradients, .* of .* tokens of the"),
        ({}, "computed with the rest, since too few tokens are before the first"),
        ({"frozen_prompt": False}, "computed with the rest, since frozen_prompt is f"),
        ({"positions": "f2+l2"}, "since positions: f2.l2 edits the prompt's beginning"),
    ],
)  # fmt: skip
def test_it_says_once_what_is_done_and_why(
    config, tmp_path, monkeypatch, block, expected
):
    told = []
    for name in ("axolotl_reft.plugin.plugin", "axolotl_reft.training.frozen_prompt"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "disabled", False)
        monkeypatch.setattr(logger, "handle", lambda r: told.append(r.getMessage()))
    train(config, 2, loreft=BLOCK | block, output_dir=str(tmp_path))
    told = [text for text in told if "frozen prompt" in text]
    assert len(told) == 1 and "LoReFT: frozen prompt: " in told[0]
    assert re.search(expected, told[0])


def test_nothing_is_kept_after_a_training_or_without_a_cache(config, tmp_path, parts):
    for cache in ("1MB", 0):
        block = {**BLOCK, "frozen_prompt": True, "frozen_prompt_cache": cache}
        model, _ = train(config, 2, loreft=block, output_dir=str(tmp_path))
        kept = hooks_of(model.get_base_model()).frozen_prompt.kept
        assert kept.limit == (1_000_000 if cache else 0)
        assert kept.bytes == 0 and len(kept) == 0
    assert len(parts) >= 4


def _train_and_evaluate(path):
    train_cli(path, max_steps=2)
    evaluate_cli(path)


@pytest.mark.slow
def test_it_trains_and_evaluates_from_the_command_line(config, tmp_path):
    path = build_config(
        config.parent,
        "line.yml",
        loreft={**BLOCK, "frozen_prompt": True, "frozen_prompt_cache": "1MB"},
        output_dir=str(tmp_path / "out"),
    )
    code, text = run_forked(_train_and_evaluate, str(path), directory=tmp_path)
    assert code == 0, text[-3000:]
    told = re.findall("frozen prompt: .*", text)
    assert len(told) == 2, told  # of the training, and of the evaluation
    for line in told:
        assert "computed without gradients" in line and "in up to 0.001 GB" in line
