"""What must not drift: thousands of steps, casts, and resuming again and again."""

import bitsandbytes
import pytest
import torch
from conftest import build_model
from peft import PeftModel, get_peft_model

from axolotl_reft import LoreftConfig
from axolotl_reft.core.interventions import INTERVENTION_CLASSES, LoreftIntervention

STEPS = 2000
OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    # The numbers here are few: without this it would keep them in 32 bits.
    "AdamW8bit": lambda p, **kw: bitsandbytes.optim.AdamW8bit(p, min_8bit_size=1, **kw),
}


def orthonormality_error(intervention):
    matrix = intervention.rotation_matrix().detach().double()
    return (matrix.T @ matrix - torch.eye(matrix.shape[1])).abs().max().item()


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_stay_orthonormal_over_thousands_of_steps(optimizer, dtype):
    torch.manual_seed(0)
    ours = LoreftIntervention(embed_dim=64, low_rank_dimension=4)
    start = ours.rotation_matrix().detach()
    steps = OPTIMIZERS[optimizer](ours.parameters(), lr=1e-2, weight_decay=0.1)
    target = torch.randn(8, 64).to(dtype)
    for _ in range(STEPS):
        hidden = torch.randn(8, 64).to(dtype)
        steps.zero_grad()
        (ours(hidden) - target).float().square().mean().backward()
        steps.step()
    assert orthonormality_error(ours) < 1e-5
    assert (ours.rotation_matrix() - start).abs().max() > 0.01
    if optimizer == "AdamW8bit":
        assert steps.state[ours.rotation]["state1"].dtype == torch.uint8


def batch(tokens, step):
    ids = tokens(2, 12, seed=step)
    labels = ids.clone()
    labels[:, :7] = -100
    return {"input_ids": ids, "labels": labels}


def trained_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, optimizer, tokens, steps):
    losses = []
    for step in steps:
        loss = model(**batch(tokens, step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def new_optimizer(model):
    return torch.optim.AdamW(trained_parameters(model), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("intervention", list(INTERVENTION_CLASSES))
def test_twenty_resumed_runs_are_one_to_the_last_bit(tokens, tmp_path, intervention):
    settings = {"intervention": intervention, "positions": "f2+l2", "rank": 3}
    torch.manual_seed(1)
    model = get_peft_model(build_model(), LoreftConfig(**settings)).train()
    model.save_pretrained(tmp_path)
    expected = train(model, new_optimizer(model), tokens, range(60))
    losses, state = [], None
    for cycle in range(20):
        base = build_model()
        torch.manual_seed(100 + cycle)  # nothing may come back by the same dice
        resumed = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
        resumed.train()
        optimizer = new_optimizer(resumed)
        if state is not None:
            optimizer.load_state_dict(state)
        losses += train(resumed, optimizer, tokens, range(3 * cycle, 3 * cycle + 3))
        resumed.save_pretrained(tmp_path)
        state = optimizer.state_dict()
    assert losses == expected
    for ours, theirs in zip(
        trained_parameters(resumed), trained_parameters(model), strict=True
    ):
        assert torch.equal(ours, theirs)
    for module in resumed.modules():
        if "rotation" in module._parameters:
            assert orthonormality_error(module) < 1e-5


def test_casting_there_and_back_changes_no_number(tokens):
    torch.manual_seed(1)
    model = get_peft_model(build_model(), LoreftConfig(rank=3))
    train(model.train(), new_optimizer(model), tokens, range(5))
    before = {k: v.clone() for k, v in model.state_dict().items() if ".intv_" in k}
    for _ in range(10):
        model.to(torch.bfloat16).to(torch.float32)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
