"""Whatever takes the steps, the loss falls and every R keeps orthonormal columns."""

import pytest
import torch
from training import train
from workspace import build_workspace

pytestmark = pytest.mark.slow

# Signs and orthogonal updates are longer steps than gradients are.
OPTIMIZERS = [
    ("adamw_torch", {}),
    ("adamw_torch_fused", {}),
    ("adamw_8bit", {}),
    ("ademamix", {}),
    ("lion_8bit", {"learning_rate": 0.005}),
    ("adafactor", {}),
    ("schedule_free_adamw", {"lr_scheduler": "constant"}),
    ("muon", {"learning_rate": 0.05}),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return build_workspace(tmp_path_factory.mktemp("optimizers"))


def interventions(model):
    return [m for m in model.modules() if "rotation" in m._parameters]


def has_learned(model, losses):
    """With R away from its start, and still orthonormal."""
    found = interventions(model)
    for intervention in found:
        r_DR = intervention.rotation_matrix().detach().double()
        identity_RR = torch.eye(r_DR.shape[1], dtype=torch.float64)
        torch.testing.assert_close(r_DR.T @ r_DR, identity_RR, atol=1e-5, rtol=0)
        assert intervention.rotation.dtype == torch.float32
    # They start at zero; no loss depends on the last layer's edits of first tokens.
    moved = sum(bool(intervention.rotation.tril(-1).any()) for intervention in found)
    assert len(found) == 3 * 2 and moved == 5
    return losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("optimizer", "changes"), OPTIMIZERS)
def test_an_optimizer(optimizer, changes, config, tmp_path):
    model, losses = train(
        config, 8, optimizer=optimizer, output_dir=str(tmp_path), **changes
    )
    assert has_learned(model, losses), losses


def test_noise_on_the_embeddings_reaches_the_training_and_stays_out_of_the_adapter(
    config, tmp_path
):
    _, plain = train(config, 8, output_dir=str(tmp_path / "plain"))
    model, noisy = train(
        config, 8, neftune_noise_alpha=5, output_dir=str(tmp_path / "noisy")
    )
    assert has_learned(model, noisy), noisy
    assert noisy[0] != plain[0]
    assert not model.get_input_embeddings()._forward_hooks


def test_groups_of_learning_rates_name_the_adapter_s_numbers(config, tmp_path):
    groups = [{"name": "rotations", "modules": ["rotation"], "lr": 0.0}]
    model, losses = train(config, 8, lr_groups=groups, output_dir=str(tmp_path))
    assert losses[-1] < losses[0]
    assert not any(m.rotation.any() for m in interventions(model))
