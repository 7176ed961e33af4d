"""Hundreds of ``loreft:`` blocks: each trains as it is written, or is refused."""

import contextlib
import math

import pytest
import torch
from conftest import HIDDEN, LAYERS, VOCABULARY, build_model
from fuzzing import VALUES, refusal
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from axolotl_reft import LoreftConfig
from axolotl_reft.plugin.args import LoreftBlock, check_as_written
from axolotl_reft.settings.components import COMPONENTS
from axolotl_reft.settings.spec import INTERVENTIONS
from axolotl_reft.tuner.layer import LoreftDecoderLayer

NUMBERS = st.integers(-LAYERS, LAYERS)
LAYER_SETS = st.one_of(
    st.just("all"),
    NUMBERS,
    st.lists(NUMBERS, max_size=3),
    st.builds("{}-{}".format, NUMBERS, NUMBERS),
    st.builds("{}, {}".format, NUMBERS, NUMBERS),
)
RANKS = st.integers(0, HIDDEN + 1)
SIDES = st.integers(0, 20)
# Each key near to what it takes; any key may also get anything.
NEAR = {
    "layers": LAYER_SETS,
    "positions": st.one_of(
        st.just("all"),
        st.builds("f{}".format, SIDES),
        st.builds("l{}".format, SIDES),
        st.builds("f{}+l{}".format, SIDES, SIDES),
        st.text("fl+0127", max_size=6),
    ),
    "rank": RANKS
    | st.dictionaries(
        NUMBERS | st.sampled_from(["all", "0-1", "2", "1-", "x"]), RANKS, max_size=3
    ),
    "turns": st.sampled_from(["every", "first", "last", "Every"]),
    "tied_weights": st.booleans() | st.sampled_from(["yes", "true", 1, 0]),
    "intervention": st.sampled_from([*INTERVENTIONS, "LoReFT", "lora"]),
    "component": st.sampled_from(
        [
            *COMPONENTS,
            "mlp.down_proj.input",
            "model.layers[1].mlp.output",
            "mlp.x.output",
        ]
    )
    | st.text("ml.[]1p", max_size=8).map("{}.output".format),
    "dropout": st.floats(0, 1) | st.sampled_from([0, 1, "0.1", -0.0]),
    "act_fn": st.sampled_from(["gelu", "relu", "silu", "prelu", "tanh", "linear", ""]),
    "init_weights": st.sampled_from(["random", "identity", "Identity", True]),
    "lora": st.fixed_dictionaries(
        {},
        optional={
            "r": RANKS,
            "alpha": st.integers(-1, 32) | st.floats(),
            "dropout": st.floats(-0.5, 1.5),
            "target_modules": st.sampled_from(["all-linear", "q_proj"])
            | st.lists(st.sampled_from(["q_proj", "mlp.up_proj", "x"]), max_size=2),
        },
    ),
    "modules_to_save": st.lists(st.sampled_from(["lm_head", "norm"]), max_size=2),
}
IN_CODE = NEAR | {
    "turn_markers": st.fixed_dictionaries(
        {
            "generation_prompts": st.lists(st.lists(NUMBERS, max_size=2), max_size=2),
            "end_of_turn": st.lists(NUMBERS, max_size=2),
        }
    ),
}


def blocks(near):
    """Mostly one key that may be anything beside others near to right."""
    anything = st.sampled_from(list(near)).flatmap(
        lambda key: st.fixed_dictionaries({key: VALUES})
    )
    likely = st.fixed_dictionaries({}, optional=near)
    return st.builds(lambda one, others: others | one, anything, likely) | likely


def accepted(build, keys):
    """What ``build()`` makes; None where it is refused by the name of a key."""
    try:
        return build()
    except ValueError as error:
        message = refusal(error)
        assert message.startswith((*keys, "loreft: ")), message
        return None


def same(one, other):
    """Equal and of equal types, to which True and 1, and "8" and 8, are not equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    number = {int, float}
    return one == other and (
        type(one) is type(other) or {type(one), type(other)} <= number
    )


def as_kept(value):
    """A mapping's keys are kept as text."""
    if isinstance(value, dict):
        return {str(key): one for key, one in value.items()}
    return value


def assert_means_what_is_written(config, written):
    for key, value in written.items():
        if key == "lora" and value is not None:
            continue  # filled in; see test_lora.py
        value = as_kept(value)
        default = LoreftConfig.__dataclass_fields__[key].default
        assert same(getattr(config, key), default if value is None else value), key


@settings(max_examples=300)
@given(blocks(NEAR))
@example({"rank": {1: 4, "1": 8, "all": 2}})
@example({"component": "..output"})
@example({"component": ".mlp.output"})
@example({"component": "layers[0]mlp.output"})
@example({None: 8})
def test_a_block_is_taken_as_it_is_written_or_refused(block):
    keys = tuple(f"{key}: " for key in NEAR)
    if made := accepted(lambda: checked(block), keys):
        kept = {key: value for key, value in block.items() if value is not None}
        dumped = made.model_dump()
        assert all(same(dumped[key], as_kept(value)) for key, value in kept.items())
        assert_means_what_is_written(LoreftConfig(**kept), kept)


def checked(block):
    check_as_written({"adapter": "loreft", "loreft": block})
    return LoreftBlock(**block)


@settings(max_examples=100)
@given(VALUES)
@example([])
@example(False)
@example({"rank": {}})
def test_a_block_that_is_something_else_is_refused(value):
    written = {"adapter": "loreft", "loreft": value}
    with contextlib.suppress(ValueError):
        check_as_written(written)
        assert value is None or (
            isinstance(value, dict) and value.keys() <= set(NEAR)
        ), value


@settings(max_examples=300)
@given(blocks(IN_CODE))
@example({"turn_markers": {"generation_prompts": [[-1]], "end_of_turn": [1]}})
@example({"modules_to_save": "norm"})
def test_a_configuration_is_taken_as_it_is_written_or_refused(written):
    keys = tuple(f"{key}: " for key in IN_CODE)
    # In Python None is a value; for these it is no allowed one.
    config = accepted(lambda: LoreftConfig(**written), keys)
    if config is not None:
        assert_means_what_is_written(config, written)


@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_what_is_accepted_trains_as_it_is_written(intervention):
    trained = 0

    @settings(max_examples=40)
    @given(st.fixed_dictionaries({}, optional=IN_CODE))
    @example({"positions": "f999999999+l999999999"})
    @example({"layers": [0, 2], "rank": {0: 3, 2: 5}, "positions": "f2+l1"})
    @example({"lora": {"r": 999_999_999}})
    @example({"lora": {"alpha": 1e6}})
    @example({"lora": {"alpha": 1e-6}})
    def check(written):
        nonlocal trained
        written = written | {"intervention": intervention}
        keys = tuple(f"{key}: " for key in IN_CODE)
        config = accepted(lambda: LoreftConfig(**written), keys)
        model = config and accepted(lambda: get_peft_model(build_model(), config), keys)
        if model:
            assert_built_as_written(model, config)
            assert_trains(model)
            trained += 1

    check()
    assert trained > 5


def test_a_path_through_another_list_of_layers_is_refused():
    config = LoreftConfig(component="elsewhere[1].mlp.output")
    with pytest.raises(ValueError, match=r"in elsewhere, .* write model.layers\[1"):
        get_peft_model(build_model(), config)


def assert_built_as_written(model, config):
    wrapped = {
        int(path.rpartition(".")[2]): module
        for path, module in model.named_modules()
        if isinstance(module, LoreftDecoderLayer) and "default" in module.intv_0
    }
    ranks = config.spec().ranks(LAYERS)
    assert sorted(wrapped) == sorted(ranks)
    for number, rank in ranks.items():
        layer = wrapped[number]
        assert layer.intv_0["default"].rank == rank
        assert layer.intv_0["default"].dropout_p == config.dropout
        assert str(layer.specs["default"].positions) == config.positions
        untied = "+" in config.positions and not config.tied_weights
        assert ("default" in layer.intv_1) == untied


def assert_trains(model):
    ids = torch.arange(3, 13).remainder(VOCABULARY).unsqueeze(0)
    labels = ids.masked_fill(torch.arange(10) < 6, -100)
    loss = model.train()(input_ids=ids, labels=labels).loss
    loss.backward()
    assert math.isfinite(loss.item())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
