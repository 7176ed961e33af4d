import copy

import pyreft
import pytest
import torch

from axolotl_reft.config import INTERVENTIONS
from axolotl_reft.interventions import INTERVENTION_CLASSES
from axolotl_reft.pyreft_objects import make_pyreft_object

SIZE, RANK = 24, 3

PYREFT_CLASSES = {
    "loreft": pyreft.LoreftIntervention,
    "noreft": pyreft.NoreftIntervention,
    "direft": pyreft.NodireftIntervention,
    "orthogonal_direft": pyreft.DireftIntervention,
    "consreft": pyreft.ConsreftIntervention,
    "lobireft": pyreft.LobireftIntervention,
}
ROTATED = [name for name in INTERVENTIONS if name not in ("noreft", "direft")]


@pytest.fixture(params=INTERVENTIONS)
def name(request):
    return request.param


def build(name, **settings):
    torch.manual_seed(0)
    ours = INTERVENTION_CLASSES[name](
        embed_dim=SIZE, low_rank_dimension=RANK, **settings
    )
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return ours


def test_every_intervention_of_the_config_has_a_class():
    assert tuple(INTERVENTION_CLASSES) == INTERVENTIONS


def test_the_object_is_pyrefts(name):
    assert isinstance(build(name), PYREFT_CLASSES[name])


@pytest.mark.parametrize("act_fn", [None, "gelu"])
def test_edit_and_gradients_agree_with_pyreft(name, act_fn):
    settings = {} if act_fn is None or name in ("consreft", "lobireft") else {
        "act_fn": act_fn
    }  # fmt: skip
    ours = build(name, **settings)
    theirs = make_pyreft_object(name, ours, settings.get("act_fn"), dropout=0.0)
    torch.manual_seed(1)
    hidden = torch.randn(2, 5, SIZE)
    weights = torch.randn(2, 5, SIZE)
    mine, yours = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    got, expected = ours(mine), theirs(yours)
    assert (got - expected).abs().max() < 1e-6
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    assert (mine.grad - yours.grad).abs().max() < 1e-5
    if name in ("consreft", "lobireft"):
        assert (ours.bias.grad - theirs.learned_source.grad).abs().max() < 1e-5
    else:
        their_source = theirs.learned_source
        assert (ours.weight.grad - their_source.weight.grad).abs().max() < 1e-4
        assert (ours.bias.grad - their_source.bias.grad).abs().max() < 1e-5


def test_numbers_are_direct_parameters_of_a_leaf(name):
    ours = build(name)
    assert list(ours.children()) == []
    assert set(ours.state_dict()) == {
        *dict(ours.named_parameters()),
        *dict(ours.named_buffers()),
    }
    assert all("." not in key for key in ours.state_dict())


def test_a_parent_saves_and_reloads_it_exactly(name):
    parent, other = torch.nn.ModuleDict({"a": build(name)}), torch.nn.ModuleDict()
    torch.manual_seed(5)
    other["a"] = INTERVENTION_CLASSES[name](embed_dim=SIZE, low_rank_dimension=RANK)
    other.load_state_dict(parent.state_dict())
    hidden = torch.randn(4, SIZE)
    assert torch.equal(parent["a"](hidden), other["a"](hidden))


def test_a_cast_of_the_model_leaves_it_in_float32(name):
    ours = build(name)
    before = copy.deepcopy(ours.state_dict())
    torch.nn.Sequential(ours).to(torch.bfloat16).half().double()
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())
    assert {v.dtype for v in ours.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_edited_in_float32(name, dtype):
    ours = build(name)
    hidden = torch.randn(4, SIZE).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(hidden)
    assert got.dtype == dtype
    assert torch.equal(got, ours(hidden.float()).to(dtype))


@pytest.mark.parametrize("name", [n for n in INTERVENTIONS if n != "consreft"])
def test_dropout_is_on_the_whole_new_hidden_state(name):
    ours = build(name, dropout=0.5).train()
    hidden = torch.randn(100, SIZE)
    got = ours(hidden)
    assert 0.4 < (got == 0).float().mean() < 0.6
    kept = got != 0
    assert torch.allclose(got[kept], 2 * ours.eval()(hidden)[kept], atol=1e-5)


def test_rank_larger_than_hidden_size_is_refused(name):
    with pytest.raises(ValueError, match="rank: 25 is larger than the hidden size 24"):
        INTERVENTION_CLASSES[name](embed_dim=SIZE, low_rank_dimension=25)


def test_weights_of_another_size_are_refused(name):
    parent = torch.nn.ModuleDict({"a": build(name)})
    other = torch.nn.ModuleDict(
        {"a": INTERVENTION_CLASSES[name](embed_dim=16, low_rank_dimension=RANK)}
    )
    with pytest.raises(ValueError, match="load it on the base model it was trained on"):
        other.load_state_dict(parent.state_dict())


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_weight_decay_leaves_the_rotation_orthonormal(name, optimizer):
    ours = build(name)
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    steps = getattr(torch.optim, optimizer)(ours.parameters(), **settings)
    for seed in range(30):
        hidden = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(seed))
        steps.zero_grad()
        ours(hidden).square().sum().backward()
        steps.step()
    matrix = ours.rotation_matrix().double()
    assert (matrix.T @ matrix - torch.eye(RANK)).abs().max() < 1e-6


def test_loreft_sets_the_subspace_to_the_source():
    """Of Φ(h) = h + Rᵀ(Wh + b − Rh): RΦ(h) = Wh + b, and the rest of h is kept."""
    ours = build("loreft")
    hidden = torch.randn(4, SIZE)
    matrix = ours.rotation_matrix()
    source = hidden @ ours.weight.T + ours.bias
    assert torch.allclose(ours(hidden) @ matrix, source, atol=1e-5)
    keep = torch.eye(SIZE) - matrix @ matrix.T
    assert torch.allclose(ours(hidden) @ keep, hidden @ keep, atol=1e-5)
