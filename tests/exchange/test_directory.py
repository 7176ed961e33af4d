"""Directories of pyreft's, there and back; and those that must not be read."""

import json
import pickle
from importlib.metadata import entry_points
from pathlib import Path

import pyreft
import pytest
import torch
from click.testing import CliRunner
from conftest import build_adapter, build_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from axolotl_reft import from_pyreft, to_pyreft
from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.exchange.directory import export_adapter
from axolotl_reft.exchange.live import import_adapter
from axolotl_reft.exchange.objects import make_pyreft_object, read_pyreft_state
from axolotl_reft.plugin.commands import reft
from axolotl_reft.settings.spec import INTERVENTIONS

PROMPT = 9


@pytest.fixture
def base(tmp_path):
    build_model().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def ids(tokens):
    return tokens(1, PROMPT)


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


def save(directory, **settings):
    """A saved adapter and its model; W is exact in bfloat16, as pyreft reads it."""
    model = build_adapter(build_model(), **{"rank": 2} | settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".default.weight", ".default.bias")):
                parameter.copy_(parameter.bfloat16())
    model.save_pretrained(directory)
    return model


def run(*arguments):
    return CliRunner().invoke(reft, [str(argument) for argument in arguments])


@pytest.mark.parametrize("intervention", INTERVENTIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_computes_the_same(tmp_path, base, ids, intervention, tied):
    model = save(tmp_path / "a", intervention=intervention, tied_weights=tied)
    done = run("export", tmp_path / "a", tmp_path / "out")
    assert done.exit_code == 0, done.output
    done = run("import", tmp_path / "out", tmp_path / "b", "--base-model", base)
    assert done.exit_code == 0, done.output
    back = PeftModel.from_pretrained(build_model(), tmp_path / "b")
    assert torch.allclose(logits(back, ids), logits(model, ids), atol=1e-5)
    live = from_pyreft(tmp_path / "out", build_model())
    assert torch.allclose(logits(live, ids), logits(model, ids), atol=1e-5)
    settings = back.peft_config["default"]
    assert (settings.intervention, settings.tied_weights) == (intervention, tied)
    assert (settings.positions, settings.layers) == ("f2+l3", [0, 1, 2])


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "intervention", [n for n in INTERVENTIONS if n not in ("noreft", "direft")]
)
def test_pyreft_loads_what_is_exported(tmp_path, ids, intervention, tied):
    """Not NoReFT and its relative: pyreft 0.1.0 cannot load those that it saved."""
    model = save(tmp_path / "a", intervention=intervention, tied_weights=tied)
    export_adapter(str(tmp_path / "a"), str(tmp_path / "out"))
    theirs = pyreft.ReftModel.load(str(tmp_path / "out"), build_model())
    theirs.set_device("cpu")
    for one in theirs.interventions.values():
        one.float()
    locations = [[[0, 1]]] * 3 + [[[6, 7, 8]]] * 3
    if tied:
        locations = [[[0, 1, 6, 7, 8]]] * 3
    where = {"sources->base": (None, locations)}
    _, got = theirs({"input_ids": ids}, unit_locations=where)
    assert torch.allclose(got.logits, logits(model, ids), atol=1e-5)
    _, tokens = theirs.generate(
        {"input_ids": ids}, unit_locations=where, intervene_on_prompt=True,
        max_new_tokens=5, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, expected)


COMPONENTS_SAVED = [
    "mlp_output",
    "attention_value_output",
    "mlp_activation",
    "mlp.down_proj.output",
    "model.layers[1].mlp.output",
    "self_attn.q_proj.output",
    "model.layers[2].output",
]


def load_by_hand(directory):
    """pyreft's model from a directory, with its interventions made beforehand."""
    settings = json.loads((directory / "config.json").read_text())
    representations = []
    for key, size, place in zip(
        settings["sorted_keys"],
        settings["intervention_dimensions"],
        settings["representations"],
        strict=True,
    ):
        layer, component, _, _, rank, *_ = place
        one = pyreft.LoreftIntervention(
            embed_dim=size, low_rank_dimension=rank, dtype=torch.float32
        )
        file = directory / f"intkey_{key}.bin"
        one.load_state_dict(torch.load(file, weights_only=True))
        representations.append(
            {
                "layer": layer,
                "component": component,
                "low_rank_dimension": rank,
                "intervention": one,
            }
        )
    config = pyreft.ReftConfig(representations=representations)
    model = pyreft.get_reft_model(build_model(), config, set_device=False)
    assert list(model.interventions) == settings["sorted_keys"]
    return model


@pytest.mark.parametrize("component", COMPONENTS_SAVED)
def test_other_components_there_and_back(tmp_path, base, ids, component):
    model = save(tmp_path / "a", component=component)
    done = run("export", tmp_path / "a", tmp_path / "out")
    by_path = component == "mlp.down_proj.output"
    assert ("cannot load a component that is given by its path" in done.output) is (
        by_path
    )
    if by_path:
        # pyreft 0.1.0 does not find the width of a path, so it is given objects.
        theirs = load_by_hand(tmp_path / "out")
    else:
        theirs = pyreft.ReftModel.load(str(tmp_path / "out"), build_model())
    theirs.set_device("cpu")
    for one in theirs.interventions.values():
        one.float()
    where = {"sources->base": (None, [[[0, 1, 6, 7, 8]]] * len(theirs.interventions))}
    with torch.no_grad():
        _, got = theirs({"input_ids": ids}, unit_locations=where)
    assert torch.allclose(got.logits, logits(model, ids), atol=1e-5)
    done = run("import", tmp_path / "out", tmp_path / "b", "--base-model", base)
    assert done.exit_code == 0, done.output
    back = PeftModel.from_pretrained(build_model(), tmp_path / "b")
    assert torch.allclose(logits(back, ids), logits(model, ids), atol=1e-5)


def test_what_a_live_model_saves_is_what_is_exported(tmp_path, base, ids):
    save(tmp_path / "a", tied_weights=False)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "a"
    )
    export_adapter(str(tmp_path / "a"), str(tmp_path / "exported"))
    live = to_pyreft(model)
    live.save(str(tmp_path / "saved"))
    # As pyreft's trainer does; its folder may be there already.
    live.save_intervention(save_directory=tmp_path / "kept", include_model=True)
    live.save_intervention(save_directory=tmp_path / "kept", include_model=True)
    files = {file.name for file in (tmp_path / "exported").iterdir()}
    for folder in ("saved", "kept"):
        assert {file.name for file in (tmp_path / folder).iterdir()} == files
        for name in files:
            file, expected = tmp_path / folder / name, tmp_path / "exported" / name
            if file.suffix == ".bin":
                got, wanted = torch.load(file), torch.load(expected)
                assert got.keys() == wanted.keys()
                assert all(torch.equal(got[key], wanted[key]) for key in got)
    assert pyreft.ReftModel.load(str(tmp_path / "saved"), build_model())
    with pytest.raises(ValueError, match="save: only a directory can be saved to"):
        live.save(str(tmp_path / "hub"), save_to_hf_hub=True)


def test_an_export_knows_its_base(tmp_path, base, ids):
    model = save(tmp_path / "a")
    export_adapter(str(tmp_path / "a"), str(tmp_path / "unnamed"))
    done = run("import", tmp_path / "unnamed", tmp_path / "c")
    assert "Error: base model: DIR does not say which one" in done.output
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    model.save_pretrained(tmp_path / "a")
    export_adapter(str(tmp_path / "a"), str(tmp_path / "out"))
    done = run("import", tmp_path / "out", tmp_path / "b")
    assert done.exit_code == 0, done.output
    back = PeftModel.from_pretrained(build_model(), tmp_path / "b")
    assert torch.allclose(logits(back, ids), logits(model, ids), atol=1e-5)
    (tmp_path / "out" / "adapter_config.json").unlink()
    done = run("import", tmp_path / "out", tmp_path / "c", "--positions", "f2+l3")
    assert done.exit_code == 1
    assert "Error: base model: DIR does not say which one" in done.output


def test_a_bias_of_pyrefts_that_is_not_here_is_named():
    state = {
        "learned_source.weight": torch.zeros(2, 32),
        "learned_source.bias": torch.zeros(2),
        "proj_layer.weight": torch.zeros(2, 32),
        "proj_layer.bias": torch.zeros(2),
    }
    with pytest.raises(ValueError, match="it was trained with add_bias=True"):
        read_pyreft_state("noreft", state)


@pytest.mark.parametrize(
    ("component", "asks"),
    [("mlp.output", False), ("mlp.down_proj.output", True), ("mlp_input", False)],
)
def test_a_trainers_checkpoint_of_another_component(
    tmp_path, base, ids, component, asks
):
    model = save(tmp_path / "a", component=component)
    export_adapter(str(tmp_path / "a"), str(tmp_path / "out"))
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / "out" / name).unlink()
    settings = {"positions": "f2+l3"}
    if asks:
        with pytest.raises(ValueError, match="dots became underscores; pass it with"):
            from_pyreft(tmp_path / "out", build_model(), **settings)
        settings["component"] = component
    back = from_pyreft(tmp_path / "out", build_model(), **settings)
    assert torch.allclose(logits(back, ids), logits(model, ids), atol=1e-5)


def test_one_layer_is_one_file_as_servers_read_it(tmp_path):
    """EasySteer takes a directory with one pickle of these three tensors."""
    save(tmp_path / "a", layers=[1])
    export_adapter(str(tmp_path / "a"), str(tmp_path / "out"))
    (file,) = (tmp_path / "out").glob("*.bin")
    state = torch.load(file, weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "weight": (2, 32),
        "bias": (2,),
        "rotate_layer": (32, 2),
    }


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_layers_with_ranks_of_their_own(tmp_path, base, ids, tied):
    model = save(tmp_path / "a", rank={"0-1": 3, 2: 1}, tied_weights=tied)
    export_adapter(str(tmp_path / "a"), str(tmp_path / "out"))
    done = run("import", tmp_path / "out", tmp_path / "b", "--base-model", base)
    assert done.exit_code == 0, done.output
    back = PeftModel.from_pretrained(build_model(), tmp_path / "b")
    assert torch.allclose(logits(back, ids), logits(model, ids), atol=1e-5)
    assert back.peft_config["default"].rank == {"0": 3, "1": 3, "2": 1}


def test_without_our_config_what_pyreft_does_not_save_is_asked_for(tmp_path, base, ids):
    model = save(tmp_path / "a", act_fn="gelu", dropout=0.25)
    export_adapter(str(tmp_path / "a"), str(tmp_path / "out"))
    (tmp_path / "out" / "adapter_config.json").unlink()
    done = run("import", tmp_path / "out", tmp_path / "b", "--base-model", base)
    assert done.exit_code == 1
    assert "Error: positions: pyreft does not save which positions" in done.output
    assert not (tmp_path / "b").exists()
    done = run(
        "import", tmp_path / "out", tmp_path / "b", "--base-model", base,
        "--positions", "f2+l3", "--act-fn", "gelu", "--dropout", "0.25",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    back = PeftModel.from_pretrained(build_model(), tmp_path / "b")
    assert torch.allclose(logits(back, ids), logits(model, ids), atol=1e-5)
    assert back.peft_config["default"].dropout == 0.25


@pytest.mark.parametrize(
    ("intervention", "asks"),
    [
        ("loreft", False),
        ("orthogonal_direft", False),
        ("noreft", True),
        ("direft", True),
        ("consreft", True),
        ("lobireft", True),
    ],
)
def test_a_checkpoint_of_pyrefts_trainer(tmp_path, base, ids, intervention, asks):
    """`intervenable_model/` with the pickles and no config."""
    model = save(tmp_path / "a", intervention=intervention)
    folder = tmp_path / "checkpoint-5" / "intervenable_model"
    export_adapter(str(tmp_path / "a"), str(folder))
    for name in ("config.json", "adapter_config.json"):
        (folder / name).unlink()
    arguments = [
        "import", folder.parent, tmp_path / "b", "--base-model", base,
        "--positions", "f2+l3",
    ]  # fmt: skip
    if asks:
        done = run(*arguments)
        assert (
            done.exit_code == 1 and "does not say; pass --intervention" in done.output
        )
        arguments += ["--intervention", intervention]
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    back = PeftModel.from_pretrained(build_model(), tmp_path / "b")
    assert torch.allclose(logits(back, ids), logits(model, ids), atol=1e-5)


@pytest.fixture
def exported(tmp_path):
    save(tmp_path / "a")
    export_adapter(str(tmp_path / "a"), str(tmp_path / "out"))
    return tmp_path / "out"


def a_file(exported):
    return sorted(exported.glob("intkey_*.bin"))[0]


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("bomb-went-off"),))


def change_state(file, **changes):
    state = torch.load(file, weights_only=True)
    torch.save({k: v for k, v in (state | changes).items() if v is not None}, file)


def pickle_bomb(exported):
    a_file(exported).write_bytes(pickle.dumps({"weight": _Bomb()}))


def truncated(exported):
    a_file(exported).write_bytes(a_file(exported).read_bytes()[:200])


def not_finite(exported):
    weight = torch.load(a_file(exported), weights_only=True)["weight"]
    change_state(a_file(exported), weight=weight * float("nan"))


def wrong_shape(exported):
    change_state(a_file(exported), bias=torch.zeros(7))


def no_tensor(exported):
    change_state(a_file(exported), bias="zero")


def missing_number(exported):
    change_state(a_file(exported), bias=None)


def unknown_number(exported):
    change_state(a_file(exported), more=torch.zeros(2))


def drifted(exported):
    matrix = torch.load(a_file(exported), weights_only=True)["rotate_layer"]
    change_state(a_file(exported), rotate_layer=matrix * 1.1)


def decayed(exported):
    change_state(a_file(exported), rotate_layer=torch.zeros(32, 2))


def missing_file(exported):
    a_file(exported).unlink()


def another_component(exported):
    name = a_file(exported).name.replace("block_output", "mlp_output")
    a_file(exported).rename(exported / name)


def no_component(exported):
    (exported / "config.json").unlink()
    name = a_file(exported).name.replace("block_output", "head_query_output")
    a_file(exported).rename(exported / name)


def strange_name(exported):
    (exported / "config.json").unlink()
    a_file(exported).rename(exported / "intkey_x.bin")


def settings_of(exported, **changes):
    file = exported / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def path_in_a_key(exported):
    settings_of(exported, sorted_keys=["../../x"] * 3)


def unknown_class(exported):
    settings_of(exported, intervention_types=["<class 'os.system'>"] * 3)


def no_config(exported):
    (exported / "config.json").write_text("{")


HOSTILE = [
    (pickle_bomb, "is damaged, or holds something other than tensors"),
    (truncated, "is damaged, or holds something other than tensors"),
    (not_finite, "tensor 'weight' of pyreft's LoreftIntervention has NaN"),
    (wrong_shape, r"'bias' in pyreft's .* has shape \(7,\), expected \(2,\)"),
    (no_tensor, "is damaged, or holds something other than tensors"),
    (missing_number, "missing tensor 'bias' in pyreft's LoreftIntervention; save"),
    (unknown_number, "unexpected tensor 'more' in pyreft's LoreftIntervention"),
    (drifted, "the rotation is not orthonormal .* --intervention noreft"),
    (decayed, "the rotation is zero, as weight decay leaves pyreft's"),
    (missing_file, "the file of 'layer_0_comp_block_output.* is missing"),
    (another_component, r"different components .*'block_output', 'mlp_output'"),
    (no_component, "is not an intervention on a component that can be imported"),
    (strange_name, "is not an intervention on a component that can be imported"),
    (path_in_a_key, "the file of '../../x' is missing"),
    (unknown_class, "config.json is not pyreft's .*os.system.* is none of its six"),
    (no_config, "config.json is not pyreft's"),
]


@pytest.mark.parametrize(
    ("harm", "message"), HOSTILE, ids=lambda x: getattr(x, "__name__", "")
)
def test_what_is_damaged_or_hostile_is_refused_and_writes_nothing(
    tmp_path, base, exported, harm, message, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    harm(exported)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        import_adapter(str(exported), str(tmp_path / "b"), base_model=base)
    assert sorted(tmp_path.rglob("*")) == before


SHAPES = [(), (0,), (3,), (2, 2), (2, 32), (32, 2), (32, 32), (2, 2, 2)]


@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_numbers_of_any_other_shape_are_refused(intervention):
    ours = INTERVENTION_CLASSES[intervention](embed_dim=32, low_rank_dimension=2)
    good = make_pyreft_object(intervention, ours, None, 0.0).state_dict()
    reads = [lambda state: read_pyreft_state(intervention, state)]
    if intervention == "loreft":
        reads.append(lambda state: read_pyreft_state("noreft", state))
    for read in reads:
        read(good)
        for name, tensor in good.items():
            if not tensor.is_floating_point():
                continue
            for shape in SHAPES:
                if shape != tuple(tensor.shape):
                    with pytest.raises(ValueError, match="shape|orthonormal"):
                        read({**good, name: torch.rand(shape)})


def test_a_rotation_that_weight_decay_took_from_torchs_map_is_zero():
    """torch casts the diagonal to whole numbers: a step of decay makes −1 into 0."""
    ours = INTERVENTION_CLASSES["orthogonal_direft"](embed_dim=8, low_rank_dimension=2)
    theirs = make_pyreft_object("orthogonal_direft", ours, None, 0.0)
    hidden = torch.randn(3, 8)
    vectors = theirs.get_parameter("rotate_layer.parametrizations.weight.original")
    with torch.no_grad():
        vectors.mul_(0.9999)
        assert torch.equal(theirs(hidden), hidden)
    with pytest.raises(ValueError, match="the rotation is zero, as weight decay") as e:
        read_pyreft_state("orthogonal_direft", theirs.state_dict())
    # That is a way out for LoReFT alone.
    assert "noreft" not in str(e.value)


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        export_adapter(str(tmp_path / "a"), str(tmp_path / "out"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_rotation_that_drifted_is_read_as_noreft(tmp_path, base, ids, exported):
    for file in exported.glob("*.bin"):
        state = torch.load(file, weights_only=True)
        change_state(file, rotate_layer=state["rotate_layer"] * 1.1)
    model = from_pyreft(exported, build_model(), intervention="noreft")
    theirs = pyreft.NoreftIntervention(
        embed_dim=32, low_rank_dimension=2, add_bias=False, dtype=torch.float32
    )
    state = torch.load(a_file(exported), weights_only=True)
    with torch.no_grad():
        theirs.learned_source.weight.copy_(state["weight"])
        theirs.learned_source.bias.copy_(state["bias"])
        theirs.proj_layer.weight.copy_(state["rotate_layer"].T)
    ours = model.base_model.model.model.layers[0].intv_0["default"]
    hidden = torch.randn(3, 32)
    assert torch.allclose(ours(hidden), theirs(hidden), atol=1e-5)


def test_an_adapter_for_another_base_is_refused(tmp_path, exported):
    wider = build_model(hidden_size=64)
    wider.save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match="load it on the base model it was trained on"):
        from_pyreft(exported, wider)
    shallow = build_model(num_hidden_layers=2)
    with pytest.raises(ValueError, match="layers: 2 in .* is out of range"):
        from_pyreft(exported, shallow)


def test_positions_must_suit_the_interventions(tmp_path, base):
    save(tmp_path / "a", tied_weights=False)
    export_adapter(str(tmp_path / "a"), str(tmp_path / "out"))
    with pytest.raises(
        ValueError, match="l1 has one side, but there are two interventio"
    ):
        from_pyreft(tmp_path / "out", build_model(), positions="l1")


def test_prefix_and_suffix_of_different_ranks_are_refused(tmp_path):
    for name, rank in (("out", 2), ("other", 3)):
        save(tmp_path / f"a-{name}", tied_weights=False, rank=rank)
        export_adapter(str(tmp_path / f"a-{name}"), str(tmp_path / name))
    for file in (tmp_path / "out").glob("*#1.bin"):
        file.write_bytes((tmp_path / "other" / file.name).read_bytes())
    with pytest.raises(ValueError, match="suffix need the same layers and ranks"):
        from_pyreft(tmp_path / "out", build_model())


@pytest.mark.parametrize("side", [0, 1])
def test_a_layer_without_one_of_its_sides_is_refused(tmp_path, side):
    save(tmp_path / "a", tied_weights=False)
    export_adapter(str(tmp_path / "a"), str(tmp_path / "out"))
    (tmp_path / "out" / "config.json").unlink()
    next((tmp_path / "out").glob(f"*#{side}.bin")).unlink()
    with pytest.raises(ValueError, match="suffix need the same layers and ranks"):
        from_pyreft(tmp_path / "out", build_model())


def test_the_commands_are_axolotls():
    (entry,) = (
        entry
        for entry in entry_points(group="axolotl.cli_commands")
        if entry.name == "reft"
    )
    assert entry.load() is reft
    assert set(reft.commands) >= {"export", "import"}


def test_what_is_no_directory_of_pyrefts(tmp_path, base):
    done = run("import", tmp_path / "x", tmp_path / "b", "--base-model", base)
    assert done.exit_code == 1 and "there is no adapter of pyreft's in" in done.output
    done = run("export", tmp_path / "x", tmp_path / "b")
    assert done.exit_code == 1 and "there is no readable adapter in" in done.output


def test_a_base_that_cannot_be_read(tmp_path, exported):
    done = run("import", exported, tmp_path / "b", "--base-model", tmp_path / "none")
    assert done.exit_code == 1 and "base model: " in done.output


def test_a_place_in_use_is_left_alone(tmp_path, exported):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "kept").touch()
    done = run("export", tmp_path / "a", tmp_path / "b")
    assert done.exit_code == 1 and "exists and is not empty" in done.output
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["kept"]


def test_other_trained_modules_have_no_place_in_pyreft(tmp_path):
    save(tmp_path / "a", modules_to_save=["lm_head"])
    done = run("export", tmp_path / "a", tmp_path / "out")
    assert (
        done.exit_code == 1
        and "export an adapter without modules_to_save" in done.output
    )


def test_another_method_is_not_exported(tmp_path):
    lora = get_peft_model(build_model(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "a")
    done = run("export", tmp_path / "a", tmp_path / "out")
    assert done.exit_code == 1 and "is LORA, not LOREFT" in done.output
