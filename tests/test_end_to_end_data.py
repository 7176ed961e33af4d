"""Ways to feed data to `axolotl train`, each in a run of its own."""

import pytest
from test_end_to_end import axolotl, losses
from workspace import build_config, build_workspace

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
