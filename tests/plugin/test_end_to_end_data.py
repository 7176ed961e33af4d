"""Ways to feed data to `axolotl train`, each in a run of its own."""

import json

import pytest
from command_line import axolotl, losses
from training import read_data
from workspace import ANSWER, build_config, build_workspace

pytestmark = pytest.mark.slow

STEPS = 48
WAYS = {
    "streamed": {"streaming": True, "dataset_prepared_path": None},
    "grouped by length": {"group_by_length": True},
    "packed": {
        "sample_packing": True,
        "attn_implementation": "sdpa",
        "pad_to_sequence_len": True,
        "sequence_len": 64,
        "micro_batch_size": 1,
        "eval_sample_packing": False,
    },
}


@pytest.mark.parametrize("way", list(WAYS))
def test_it_trains_whichever_way_the_data_comes(tmp_path, way):
    build_workspace(tmp_path)
    changes = {"test_datasets": None, "max_steps": STEPS, "save_steps": STEPS}
    config = build_config(tmp_path, **changes | WAYS[way])
    output = axolotl("train", config)
    assert "it has no prompt and nothing is edited" not in output
    curve = losses(tmp_path / "out", STEPS)
    assert len(curve) == STEPS
    assert curve[STEPS] < 0.5 * curve[1]


def segments(directory):
    """Each sample as pieces of text, of which it says which are trained."""
    with (directory / "segments.jsonl").open("w") as out:
        for line in (directory / "train.jsonl").read_text().splitlines():
            prompt = {"label": False, "text": f"<s> {json.loads(line)['instruction']}"}
            answer = {"label": True, "text": f"{ANSWER} </s>"}
            out.write(json.dumps({"segments": [prompt, answer]}) + "\n")
    return {"path": str(directory / "segments.jsonl"), "type": "input_output"}


def tokenized(directory):
    """Token ids and labels; every third prompt is longer than a row."""
    rows = read_data(directory / "train.jsonl").to_list()
    for row in rows[::3]:
        row["input_ids"] = [1] + [4] * 40 + row["input_ids"][1:]
        row["labels"] = [-100] * 41 + row["labels"][1:]
        row["attention_mask"] = [1] * len(row["labels"])
    with (directory / "tokenized.jsonl").open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return {"path": str(directory / "tokenized.jsonl"), "type": ""}


@pytest.mark.parametrize("form", [segments, tokenized])
def test_it_trains_on_data_that_says_itself_what_is_trained(tmp_path, form):
    build_workspace(tmp_path)
    config = build_config(
        tmp_path,
        datasets=[form(tmp_path) | {"ds_type": "json", "split": "train"}],
        test_datasets=None,
        excess_length_strategy="truncate",
        max_steps=STEPS,
        save_steps=STEPS,
    )
    output = axolotl("train", config)
    assert "it has no prompt and nothing is edited" not in output
    curve = losses(tmp_path / "out", STEPS)
    assert curve[STEPS] < 0.5 * curve[1]
