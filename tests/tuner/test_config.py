from importlib.metadata import version

import pytest

from axolotl_reft import LoreftConfig, LoreftModel
from axolotl_reft.core.kinds import KINDS
from axolotl_reft.settings.foreign_names import intervention_hint
from axolotl_reft.settings.layers import resolve_layers


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ([0, 3], [0, 3]),
        ([4, 1], [1, 4]),
        ("2-4", [2, 3, 4]),
        ([-1], [5]),
        (-2, [4]),
        ("-3--1", [3, 4, 5]),
        ("1,3-4", [1, 3, 4]),
        (["0-1", 5], [0, 1, 5]),
        (3, [3]),
    ],
)
def test_layers_are_resolved(layers, numbers):
    assert resolve_layers(layers, 6) == numbers


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([6], r"layers: 6 in \[6\] is out of range, the base model has 6 layers; use 0 "
         "to 5, or -6 to -1"),
        ([-7], "layers: -7 in .* is out of range"),
        ("4-9", "layers: 9 in '4-9' is out of range"),
        ("4-2", "the range 4-2 in '4-2' is empty .* write the lower layer first"),
        ([5, -1], r"\[5, -1\] names layer 5 twice"),
    ],
)  # fmt: skip
def test_layers_outside_the_model_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        resolve_layers(layers, 6)


@pytest.mark.parametrize(
    ("layers", "rank", "ranks"),
    [
        ("all", 4, {0: 4, 1: 4, 2: 4}),
        ([1], 4, {1: 4}),
        ("all", {"0-1": 2, "2": 8}, {0: 2, 1: 2, 2: 8}),
        ("all", {"all": 1, -1: 8}, {0: 1, 1: 1, 2: 8}),
        ("0-1", {0: 3, 1: 5}, {0: 3, 1: 5}),
    ],
)
def test_ranks_of_layers(layers, rank, ranks):
    assert LoreftConfig(layers=layers, rank=rank).spec().ranks(3) == ranks


@pytest.mark.parametrize(
    ("layers", "rank", "message"),
    [
        ("all", {"0-1": 2}, "rank: layer 2 has none; name it in the mapping, or give"),
        ("all", {"0-1": 2, "1-2": 3}, "rank: layer 1 has two ranks; give it one"),
        ([0], {0: 2, 1: 3}, r"layer 1 has a rank, but is not among layers: \[0\]"),
        ("all", {"0-5": 2}, "layers: 5 in '0-5' is out of range"),
    ],
)
def test_ranks_that_do_not_suit_the_layers(layers, rank, message):
    with pytest.raises(ValueError, match=message):
        LoreftConfig(layers=layers, rank=rank).spec().ranks(3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": {}}, "rank: the mapping of layers to ranks is empty"),
        ({"rank": {"all": 0}}, "rank: 0 is not a whole number of at least 1"),
        ({"rank": {"x": 4}}, "rank: 'x' is not understood as layers"),
        ({"layers": "some"}, "layers: 'some' is not understood.*; write for exam"),
        ({"layers": []}, r"layers: \[\] is not understood as layers; write"),
        ({"layers": "3;9"}, "layers: '3;9' is not understood as layers; write"),
        ({"layers": ""}, "layers: '' is not understood"),
        ({"layers": "8-"}, "layers: '8-' is not understood"),
        ({"layers": [True]}, "layers: .* True is not a layer"),
        ({"layers": [1.5]}, "layers: .* 1.5 is not a layer"),
        ({"layers": None}, "layers: None is not understood"),
        ({"positions": "f7-l7"}, "positions: 'f7-l7' is not understood. Write f<n>"),
        ({"rank": 0}, "rank: 0 is not a whole number of at least 1"),
        ({"rank": [4, 8]}, r"rank: \[4, 8\] is not a .* layer are a mapping, for exam"),
        ({"rank": 4.0}, "rank: 4.0 is not a whole number"),
        ({"rank": "8"}, "rank: '8' is not a whole number"),
        ({"rank": True}, "rank: True is not a whole number"),
        ({"tied_weights": "yes"}, "tied_weights: 'yes' is neither true nor false"),
        ({"intervention": "lorefd"}, "intervention: 'lorefd' is unknown. Did you mean "
         "'loreft'.* Choose one of: loreft, noreft"),
        ({"intervention": "nodireft"}, "It is pyreft's name: here it is direft. Choo"),
        ({"intervention": "DireftIntervention"}, "here it is orthogonal_direft. Choo"),
        ({"intervention": LoreftModel}, "is unknown. Choose .*; classes of your own"),
        ({"component": "mlp"}, "component: 'mlp' is unknown.* one of: block_in"),
        ({"component": ["mlp_input"]}, r"component: \['mlp_input'\] is a list, and an"),
        ({"component": "head_query_output"}, "components of single heads are not supp"),
        ({"component": "h[3].mlp.output", "layers": [1]}, "names its layer"),
        ({"dropout": 1.0}, "dropout: 1.0 is not a number from 0 to below 1"),
        ({"dropout": -0.1}, "dropout: -0.1 is not a number from 0"),
        ({"dropout": "0.1"}, "dropout: '0.1' is not a number"),
        ({"dropout": 0.1, "intervention": "consreft"}, "consreft has no dropout"),
        ({"act_fn": "gelo"}, "act_fn: 'gelo' is unknown. Did you mean 'gelu'"),
        ({"act_fn": "None"}, "act_fn: 'None' is unknown.*; or null, which is linear"),
        ({"act_fn": "relu", "intervention": "lobireft"}, "lobireft has no Wh"),
        ({"act_fn": "prelu"}, "act_fn: 'prelu' has parameters of its own"),
        ({"init_weights": True}, "init_weights: True is neither random nor identity"),
        ({"init_weights": "identity", "intervention": "consreft"}, "consreft has no W"),
        ({"init_weights": "identity", "act_fn": "relu"}, "identity: with act_fn: relu"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_the_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        LoreftConfig(**settings)


def test_pyrefts_classes_in_messages_are_those_of_the_interventions():
    pyreft = pytest.importorskip("pyreft")
    for name, kind in KINDS.items():
        answer = intervention_hint(getattr(pyreft, kind.pyreft_class), ())
        assert answer == f" It is pyreft's name: here it is {name}."


def test_a_setting_of_pyrefts_or_loras_is_answered_with_ours():
    with pytest.raises(TypeError, match="no setting 'share_weights'.* is tied_weights"):
        LoreftConfig(share_weights=True)
    with pytest.raises(TypeError, match="no setting 'ranks'. Did you mean 'rank'"):
        LoreftConfig(ranks=4)


def test_every_setting_is_described():
    described = LoreftConfig.__dataclass_fields__
    own = ("layers", "positions", "rank", "tied_weights", "intervention", "component",
           "dropout", "act_fn", "init_weights", "lora", "modules_to_save")  # fmt: skip
    assert all(described[name].metadata["help"] for name in own)


def test_the_file_holds_what_was_set_and_nothing_derived(tmp_path):
    config = LoreftConfig(layers=[-1], positions="f3", rank=2, act_fn="gelu")
    config.target_modules = {"model.layers.5"}
    config.save_pretrained(tmp_path)
    loaded = LoreftConfig.from_pretrained(tmp_path)
    assert loaded.axolotl_reft_version == version("axolotl-reft")
    config.axolotl_reft_version = loaded.axolotl_reft_version
    assert loaded == config
    assert loaded.target_modules is None
