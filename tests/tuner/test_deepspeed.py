"""DeepSpeed's ZeRO in two processes on the CPU computes what one process computes.

DeepSpeed builds from source and is not among the project's dependencies; where it is
installed, this runs. On a CPU it compiles an operator of its own at the first start.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model
from distributed_runs import INSIDE, STEPS, UNTIED, adapted, collate, samples

from distributed_runs import join, launch  # isort: skip
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from axolotl_reft import LoreftConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
    ),
]

PROBE = torch.arange(3, 11)[None]
# Stage, settings of the adapter, and whether the base is made in pieces from the start.
CASES = {
    "stage 2": (2, UNTIED, False),
    "stage 3": (3, UNTIED, False),
    "stage 3, inside a layer": (3, INSIDE, False),
    "stage 3, base in pieces": (3, UNTIED, True),
}


def batches(rank, processes):
    for step in range(STEPS):
        rows = samples()[step * 4 : step * 4 + 4]
        yield collate(rows if processes == 1 else rows[rank * 2 : rank * 2 + 2])


def loss_of(model, batch, count):
    labels = batch["labels"][:, 1:].flatten()
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    summed = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return summed / max(int(count), 1)


def trained_in_one_process(settings):
    model, losses = adapted(**settings), []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for batch in batches(0, 1):
        loss = loss_of(model, batch, (batch["labels"][:, 1:] != -100).sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_with_zero(rank, directory):
    os.environ["DS_ACCELERATOR"] = "cpu"
    results = {
        name: _train(rank, directory / name, *case) for name, case in CASES.items()
    }
    torch.save(results, directory / f"zero{rank}.pt")


def _train(rank, directory, stage, settings, in_pieces):
    import deepspeed
    from torch import distributed

    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    model = _base_in_pieces(directory, rank, config) if in_pieces else None
    if model is None:
        model = adapted(**settings)
    else:
        torch.manual_seed(1)
        block = {"task_type": "CAUSAL_LM", "positions": "f2+l3", "rank": 3}
        model = get_peft_model(model, LoreftConfig(**block | settings)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(trained, lr=0.5), config=config
    )
    losses = []
    for batch in batches(rank, 2):
        count = (batch["labels"][:, 1:] != -100).sum()
        distributed.all_reduce(count)
        # DeepSpeed takes the mean over processes.
        loss = loss_of(engine, batch, count)
        engine.backward(loss * 2)
        engine.step()
        total = loss.detach().clone()
        distributed.all_reduce(total)
        losses.append(total.item())
    state = model.state_dict()
    if stage == 3:
        state = engine._zero3_consolidated_16bit_state_dict()
    if rank == 0:
        model.save_pretrained(directory, state_dict=dict(state))
    model.eval()
    with torch.no_grad():
        return losses, engine(input_ids=PROBE).logits


def _base_in_pieces(directory, rank, config):
    """As transformers loads under ZeRO 3."""
    from torch import distributed
    from transformers.integrations import HfDeepSpeedConfig, deepspeed

    path = Path(directory) / "base"
    if rank == 0:
        build_model().save_pretrained(path)
    distributed.barrier()
    kept = HfDeepSpeedConfig({**config, "train_batch_size": 4})
    base = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    del kept
    deepspeed._hf_deepspeed_config_weak_ref = None
    return base


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    directory = tmp_path_factory.mktemp("zero")
    join(launch([train_with_zero], 2, directory), timeout=400)
    return directory, [torch.load(directory / f"zero{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", list(CASES))
def test_zero_has_the_losses_of_one_process(zero, case):
    expected = trained_in_one_process(CASES[case][1])
    for result in zero[1]:
        assert result[case][0] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("case", list(CASES))
@torch.no_grad()
def test_what_zero_saved_is_loaded_by_one_process(zero, case):
    directory, (first, _) = zero
    model = PeftModel.from_pretrained(build_model(), directory / case).eval()
    torch.testing.assert_close(model(PROBE).logits, first[case][1], atol=1e-5, rtol=0)
