import copy
import pickle

import pyreft
import pytest
import torch

from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.core.kinds import KINDS
from axolotl_reft.exchange.objects import make_pyreft_object
from axolotl_reft.settings.spec import INTERVENTIONS

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


@pytest.mark.parametrize("name", [n for n in INTERVENTIONS if n != "consreft"])
def test_an_identity_changes_nothing_and_is_trained(name):
    ours = INTERVENTION_CLASSES[name](
        embed_dim=SIZE, low_rank_dimension=RANK, init_weights="identity"
    )
    hidden = torch.randn(2, 5, SIZE)
    new = ours(hidden)
    assert torch.equal(new, hidden)
    new.square().sum().backward()
    learned = ours.weight if KINDS[name].has_weight else ours.bias
    assert learned.grad.abs().sum() > 0
    with torch.no_grad():
        learned.sub_(learned.grad)
    assert not torch.equal(ours(hidden), hidden)


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


def _step(ours, hidden):
    """One in eval mode, with gradients left for the next."""
    ours(hidden).square().sum().backward()
    torch.optim.SGD(ours.parameters(), lr=0.1).step()


def _step_through_data(ours, hidden):
    """As optimizers do that torch's version counter does not see."""
    ours(hidden).square().sum().backward()
    for parameter in ours.parameters():
        parameter.data.sub_(parameter.grad, alpha=0.1)
    ours.zero_grad()


def _step_after_a_look(ours, hidden):
    """Looked at once more between backward and the step."""
    ours(hidden).square().sum().backward()
    with torch.no_grad():
        ours(hidden)
    for parameter in ours.parameters():
        parameter.data.sub_(parameter.grad, alpha=0.1)
    ours.zero_grad()


def _other_numbers(ours):
    return {name: tensor * 1.5 for name, tensor in ours.state_dict().items()}


def _load_a_base(ours, hidden):
    other = INTERVENTION_CLASSES["loreft"](embed_dim=SIZE, low_rank_dimension=RANK)
    ours.load_state_dict(ours.state_dict() | {"rotation_base": other.rotation_base})


def _load_a_shard(ours, hidden):
    """As under FSDP: loaded into a tensor that forwards do not see."""
    lent = ours.rotation
    ours._parameters["rotation"] = torch.nn.Parameter(lent.detach().clone())
    ours.load_state_dict(_other_numbers(ours))
    lent.data.copy_(ours.rotation)
    ours._parameters["rotation"] = lent


def _replace(ours, hidden):
    ours.rotation.data = ours.rotation.data * 1.5


def _average(ours, hidden):
    """As a moving average puts its numbers in the place of the trained ones."""
    ours.train()
    for parameter in ours.parameters():
        parameter.data.mul_(1.5)
    ours.eval()


CHANGES = {
    "step": _step,
    "step through .data": _step_through_data,
    "step after a look": _step_after_a_look,
    "load": lambda ours, hidden: ours.load_state_dict(_other_numbers(ours)),
    "load by assignment": lambda ours, hidden: ours.load_state_dict(
        _other_numbers(ours), assign=True
    ),
    "load of another base": _load_a_base,
    "load of a shard": _load_a_shard,
    "another .data": _replace,
    "moving average": _average,
    "move": lambda ours, hidden: ours._apply(lambda tensor: tensor * 1.5),
    "in place": lambda ours, hidden: torch.nn.init.normal_(ours.rotation),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_kept_rotation_is_never_stale(change):
    ours = build("loreft").eval()
    hidden = torch.randn(4, SIZE)
    with torch.no_grad():
        before = ours(hidden)
        kept = ours._cache.get([ours])
        assert ours._cache.get([ours]) is kept
    CHANGES[change](ours, hidden)
    fresh = INTERVENTION_CLASSES["loreft"](embed_dim=SIZE, low_rank_dimension=RANK)
    fresh.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert not torch.equal(before, ours(hidden))
        assert torch.equal(ours(hidden), fresh.train()(hidden))


@pytest.mark.parametrize("training", [True, False])
def test_with_gradients_the_rotation_is_computed_each_time(training):
    ours = build("loreft").train(training)
    assert ours.rotation_matrix() is not ours.rotation_matrix()
    assert ours.rotation_matrix().requires_grad
    if training:
        with torch.no_grad():
            assert ours.rotation_matrix() is not ours.rotation_matrix()


def test_a_copy_or_a_pickle_of_an_intervention_keeps_no_rotation():
    ours = build("loreft").eval()
    with torch.inference_mode():
        kept = ours.rotation_matrix()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other._cache._kept is None
        with torch.no_grad():
            assert torch.equal(other.rotation_matrix(), kept)
    with torch.no_grad():
        assert ours.rotation_matrix().data_ptr() == kept.data_ptr()
    assert torch.equal(ours.rotation_matrix(), kept)


def test_numbers_made_in_inference_mode_have_no_versions_and_keep_nothing():
    with torch.inference_mode():
        ours = build("loreft").eval()
        before = ours.rotation_matrix()
        ours.rotation.mul_(2)
        assert not torch.equal(ours.rotation_matrix(), before)
