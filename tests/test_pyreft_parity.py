"""The whole model against ``pyreft.ReftModel``: same logits, loss and gradients."""

import pyreft
import pytest
import torch
from conftest import HIDDEN, build_adapter, build_model

LAYERS_EDITED = [0, 2]
PROMPT, ANSWER = 9, 4


def pyreft_model(base, adapter, tied):
    """pyreft's model over ``base`` with pyreft's own interventions, our numbers."""
    edited = adapter.base_model.model.model.layers
    sources = [
        container["default"]
        for container in ("intv_0", "intv_1")[: 1 if tied else 2]
        for container in [getattr(edited[n], container) for n in LAYERS_EDITED]
    ]
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": source.rank,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=HIDDEN,
                low_rank_dimension=source.rank,
                dtype=torch.float32,
            ),
        }
        for layer, source in zip(
            LAYERS_EDITED * (1 if tied else 2), sources, strict=True
        )
    ]
    model = pyreft.get_reft_model(
        base, pyreft.ReftConfig(representations=representations)
    )
    model.set_device("cpu")
    for spec, source in zip(representations, sources, strict=True):
        theirs = spec["intervention"]
        with torch.no_grad():
            theirs.learned_source.weight.copy_(source.weight)
            theirs.learned_source.bias.copy_(source.bias)
        theirs.rotate_layer.weight = source.rotation_matrix().detach()
    return model, representations, sources


def unit_locations(first, last, tied):
    half = PROMPT // 2
    prefix = list(range(min(half, first)))
    suffix = list(range(PROMPT - min(half, last), PROMPT))
    count = len(LAYERS_EDITED)
    if tied:
        return [[prefix + suffix]] * count
    return [[prefix]] * count + [[suffix]] * count


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize(
    ("positions", "tied"), [("f2+l3", True), ("f2+l3", False), ("f9+l9", False)]
)
def test_logits_loss_and_gradients_agree(tokens, architecture, positions, tied):
    first, last = (int(side[1:]) for side in positions.split("+"))
    settings = {"layers": LAYERS_EDITED, "positions": positions, "tied_weights": tied}
    adapter = build_adapter(build_model(architecture), rank=2, **settings)
    theirs, representations, sources = pyreft_model(
        build_model(architecture), adapter, tied
    )
    ids = tokens(1, PROMPT + ANSWER)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    ours = adapter(ids, labels=labels)
    _, expected = theirs(
        {"input_ids": ids},
        unit_locations={"sources->base": (None, unit_locations(first, last, tied))},
        labels=labels,
    )
    assert (ours.logits - expected.logits).abs().max() < 1e-5
    assert (ours.loss - expected.loss).abs() < 1e-6
    ours.loss.backward()
    expected.loss.backward()
    for spec, source in zip(representations, sources, strict=True):
        learned = spec["intervention"].learned_source
        assert (source.weight.grad - learned.weight.grad).abs().max() < 1e-5
        assert (source.bias.grad - learned.bias.grad).abs().max() < 1e-5


def test_our_objects_run_inside_pyrefts_model(tokens):
    settings = {"layers": LAYERS_EDITED, "positions": "f2+l3"}
    adapter = build_adapter(build_model(), rank=2, **settings)
    edited = adapter.base_model.model.model.layers
    config = pyreft.ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": 2,
                "intervention": edited[layer].intv_0["default"],
            }
            for layer in LAYERS_EDITED
        ]
    )
    model = pyreft.get_reft_model(build_model(), config)
    model.set_device("cpu")
    ids = tokens(1, PROMPT)
    with torch.no_grad():
        _, got = model(
            {"input_ids": ids},
            unit_locations={"sources->base": (None, unit_locations(2, 3, True))},
        )
        assert (got.logits - adapter(ids).logits).abs().max() < 1e-5
