"""The whole model against ``pyreft.ReftModel``: pyreft's objects, our numbers."""

from dataclasses import dataclass

import pyreft
import pytest
import torch
from conftest import build_adapter, build_model

from axolotl_reft import LoreftConfig, to_pyreft
from axolotl_reft.exchange.objects import make_pyreft_object
from axolotl_reft.prompts.positions import Positions
from axolotl_reft.settings.spec import INTERVENTIONS
from axolotl_reft.tuner.layer import LoreftDecoderLayer

LAYERS_EDITED = [0, 2]
ANSWER = 4
ROTATION = "rotate_layer.parametrizations.weight.original"


def interventions_of(adapter):
    """Ours in pyreft's order: every prefix, then every suffix."""
    layers = [m for m in adapter.modules() if isinstance(m, LoreftDecoderLayer)]
    return [
        getattr(layer, container)["default"]
        for container in ("intv_0", "intv_1")
        for layer in layers
        if "default" in getattr(layer, container)
    ]


def pyreft_model(base, adapter, objects):
    """A ``ReftModel`` over ``base`` with these interventions at its edited layers."""
    config = adapter.peft_config["default"]
    layers = LAYERS_EDITED * (len(objects) // len(LAYERS_EDITED))
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": config.rank,
            "intervention": intervention,
        }
        for layer, intervention in zip(layers, objects, strict=True)
    ]
    model = pyreft.get_reft_model(
        base, pyreft.ReftConfig(representations=representations), set_device=False
    )
    model.set_device("cpu")
    return model


def unit_locations(prompt, positions, sides):
    """pyreft's argument for one prompt, by the paper's rule."""
    parsed = Positions.parse(positions)
    prefix = list(range(min(prompt // 2, parsed.first)))
    suffix = list(range(prompt - min(prompt // 2, parsed.last), prompt))
    count = len(LAYERS_EDITED)
    if sides == 1:
        locations = [[prefix + suffix]] * count
    else:
        locations = [[prefix]] * count + [[suffix]] * count
    return {"sources->base": (None, locations)}


@dataclass
class Pair:
    """Our adapter, pyreft's model with the same numbers, and both one's objects."""

    ours: torch.nn.Module
    theirs: torch.nn.Module
    our_objects: list
    their_objects: list

    def losses(self, ids, prompt, positions):
        labels = ids.clone()
        labels[:, :prompt] = -100
        got = self.ours(ids, labels=labels)
        sides = len(self.our_objects) // len(LAYERS_EDITED)
        _, expected = self.theirs(
            {"input_ids": ids},
            unit_locations=unit_locations(prompt, positions, sides),
            labels=labels,
        )
        return got, expected


def build_pair(architecture="llama", dtype=torch.float32, **settings):
    settings = {"layers": LAYERS_EDITED} | settings
    ours = build_adapter(build_model(architecture).to(dtype), **settings)
    mine = interventions_of(ours)
    name = settings.get("intervention", "loreft")
    act_fn = settings.get("act_fn")
    yours = [make_pyreft_object(name, one, act_fn, dropout=0.0) for one in mine]
    theirs = pyreft_model(build_model(architecture).to(dtype), ours, yours)
    return Pair(ours, theirs, mine, yours)


def their_gradients(name, theirs):
    """pyreft's gradients under our names."""
    own = dict(theirs.named_parameters())
    if name in ("consreft", "lobireft"):
        found = {"bias": own["learned_source"].grad}
    else:
        found = {
            "weight": own["learned_source.weight"].grad,
            "bias": own["learned_source.bias"].grad,
        }
    if ROTATION in own:
        found["rotation"] = own[ROTATION].grad.tril(-1)
    else:
        found["proj_weight"] = own["proj_layer.weight"].grad
    return found


CASES = [
    ("f2+l3", True, 9),
    ("f2+l3", False, 9),
    ("f7+l7", True, 5),
    ("f7+l7", False, 6),
    ("f3", True, 8),
    ("l4", True, 5),
    ("l1", True, 2),
]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("intervention", INTERVENTIONS)
@pytest.mark.parametrize(("positions", "tied", "prompt"), CASES)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_logits_loss_and_gradients_agree(
    tokens, architecture, intervention, positions, tied, prompt, rank
):
    pair = build_pair(
        architecture,
        intervention=intervention,
        positions=positions,
        tied_weights=tied,
        rank=rank,
    )
    ids = tokens(1, prompt + ANSWER)
    got, expected = pair.losses(ids, prompt, positions)
    read = slice(prompt - 1, None)
    assert torch.allclose(got.logits[:, read], expected.logits[:, read], atol=2e-5)
    assert torch.allclose(got.loss, expected.loss, rtol=1e-5)
    got.loss.backward()
    expected.loss.backward()
    for mine, yours in zip(pair.our_objects, pair.their_objects, strict=True):
        own = dict(mine.named_parameters())
        for name, gradient in their_gradients(intervention, yours).items():
            scale = gradient.abs().max().clamp(min=1e-3)
            difference = (own.pop(name).grad - gradient).abs().max()
            assert difference < 1e-4 * scale, name
        assert not own


@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_a_hundred_steps_of_adamw_have_the_same_losses(tokens, intervention):
    """Within 1e-5 of the loss. A step's rounding is near 1e-7 (measured: 2e-7 after a
    hundred), but AdamW divides by the root of a second moment, so that a gradient that
    is all rounding takes a step of full size; another machine's may fall otherwise."""
    positions, prompt = "f2+l3", 9
    pair = build_pair(intervention=intervention, positions=positions, rank=4)
    optimizers = [
        torch.optim.AdamW(
            [p for one in objects for p in one.parameters()], lr=2e-3, weight_decay=0.0
        )
        for objects in (pair.our_objects, pair.their_objects)
    ]
    ours, theirs = [], []
    for step in range(100):
        got, expected = pair.losses(
            tokens(1, prompt + ANSWER, step % 7), prompt, positions
        )
        for curve, optimizer, output in zip(
            (ours, theirs), optimizers, (got, expected), strict=True
        ):
            curve.append(output.loss.item())
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
    assert theirs[98] < theirs[0] - 0.05  # the same batch, and something was learned
    assert ours == pytest.approx(theirs, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_in_bfloat16_we_err_no_more_than_pyreft(tokens, intervention):
    positions, prompt = "f2+l3", 9
    settings = {"intervention": intervention, "positions": positions, "rank": 4}
    exact, rounded = (
        build_pair(**settings),
        build_pair(dtype=torch.bfloat16, **settings),
    )
    for one in rounded.their_objects:  # pyreft's default, the rotation apart
        for part in ("learned_source", "proj_layer"):
            if isinstance(getattr(one, part, None), torch.nn.Linear):
                getattr(one, part).to(torch.bfloat16)
    ids = tokens(1, prompt + ANSWER)
    truth = exact.ours(ids, labels=exact_labels(ids, prompt)).logits
    got, expected = rounded.losses(ids, prompt, positions)
    error = (got.logits.float() - truth).abs().mean()
    their_error = (expected.logits.float() - truth).abs().mean()
    assert error < 1.1 * their_error + 1e-3


def exact_labels(ids, prompt):
    labels = ids.clone()
    labels[:, :prompt] = -100
    return labels


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_our_objects_run_inside_a_users_own_model(tokens, tied):
    adapter = build_adapter(build_model(), layers=LAYERS_EDITED, tied_weights=tied)
    objects = interventions_of(adapter)
    model = pyreft_model(build_model(), adapter, objects)
    ids = tokens(1, 9)
    sides = 1 if tied else 2
    _, got = model({"input_ids": ids}, unit_locations=unit_locations(9, "f2+l3", sides))
    assert torch.allclose(got.logits, adapter(ids).logits, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_live_model_of_pyreft_shares_everything(tokens, tied):
    adapter = build_adapter(build_model(), layers=LAYERS_EDITED, tied_weights=tied)
    model = to_pyreft(adapter)
    assert isinstance(model, pyreft.ReftModel)
    assert [id(one) for one in model.interventions.values()] == [
        id(one) for one in interventions_of(adapter)
    ]
    ids = tokens(1, 9)
    locations = unit_locations(9, "f2+l3", 1 if tied else 2)
    with torch.no_grad():
        for change in (0.0, 0.1):
            for parameter in adapter.parameters():
                parameter.add_(change)
            _, got = model({"input_ids": ids}, unit_locations=locations)
            assert torch.allclose(got.logits, adapter(ids).logits, atol=1e-4)
    # pyvene removes every hook of what it runs: not of ours.
    labels = exact_labels(tokens(1, 9), 5)
    assert not torch.equal(
        adapter(ids, labels=labels).logits[0, 5:], adapter(ids).logits[0, 5:]
    )
    assert not any(".intv_" in name for name, _ in model.model.named_modules())


def test_a_strength_has_no_place_in_pyreft():
    model = build_adapter(build_model(), positions="f2+l3")
    model.set_scale("default", 0.5)
    message = "'default' has the strength 0.5, and pyreft's .* call model.set_scale"
    with pytest.raises(ValueError, match=message):
        to_pyreft(model)
    model.set_scale("default", 1)
    to_pyreft(model)


def test_several_active_adapters_have_no_live_model():
    model = build_adapter(build_model())
    model.add_adapter("other", LoreftConfig(rank=2))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="adapters default, other are active together"):
        to_pyreft(model)
    model.set_adapter("other")
    assert len(to_pyreft(model).interventions) == 3


def test_other_adapters_have_no_live_model():
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(build_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="'default' is not a LoReFT adapter"):
        to_pyreft(lora)
