"""Damaged adapter directories, ours and pyreft's: each is refused, or is undamaged."""

import json
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, LAYERS, build_adapter, build_model
from fuzzing import refusal
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load, save

from axolotl_reft import from_pyreft
from axolotl_reft.exchange.directory import export_adapter
from axolotl_reft.saved.directory import check_adapter_fits

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SETTINGS = {
    "positions": "f2+l1",
    "tied_weights": False,
    "rank": 2,
    "lora": {"r": 2, "target_modules": ["q_proj"]},
}
# Needed in a file; turns is newer than the first adapters.
KEYS = (
    "peft_type layers positions rank tied_weights intervention component dropout act_fn"
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The two files of a good adapter, and a directory to write variants to."""
    folder = tmp_path_factory.mktemp("adapter")
    build_adapter(build_model(), **SETTINGS).save_pretrained(folder)
    files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    return files, tmp_path_factory.mktemp("variant")


def write(sound, **changed):
    files, folder = sound
    for name, content in (files | changed).items():
        (folder / name).write_bytes(content)
    return folder


def check(folder):
    return check_adapter_fits(str(folder), "lora_model_dir", HIDDEN, LAYERS)


def refused(folder):
    """Whether it is, with a message that names the setting and the place."""
    try:
        check(folder)
    except ValueError as error:
        message = refusal(error)
        assert message.startswith("lora_model_dir: "), message
        assert str(folder) in message, message
        return True
    return False


def test_what_is_undamaged_is_taken(sound):
    assert check(write(sound)).rank == 2


# --- adapter_config.json -------------------------------------------------------------


@settings(max_examples=200)
@given(st.data())
def test_a_configuration_cut_short_or_overwritten_is_refused(sound, data):
    whole = sound[0][CONFIG]
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert refused(write(sound, **{CONFIG: cut}))


@pytest.mark.parametrize("key", KEYS.split())
def test_a_missing_key_is_refused(sound, key):
    config = json.loads(sound[0][CONFIG])
    del config[key]
    assert refused(write(sound, **{CONFIG: json.dumps(config).encode()}))


@pytest.mark.parametrize("key", ["lora_alpha", "r", "zzz", "Rank", "rank "])
def test_an_unknown_key_is_refused(sound, key):
    config = json.loads(sound[0][CONFIG]) | {key: 8}
    assert refused(write(sound, **{CONFIG: json.dumps(config).encode()}))


@pytest.mark.parametrize("method", ["LORA", "IA3"])
def test_another_method_is_refused(sound, method):
    config = json.loads(sound[0][CONFIG]) | {"peft_type": method}
    assert refused(write(sound, **{CONFIG: json.dumps(config).encode()}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 3),
        ("intervention", "direft"),
        ("intervention", "consreft"),
        ("tied_weights", True),
        ("positions", "f3"),
        ("layers", [0, 1]),
        ("layers", "0-3"),
        ("lora", None),
        ("lora", {"r": 3, "target_modules": ["q_proj"]}),
        ("lora", {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
    ],
)
def test_settings_that_do_not_fit_the_tensors_are_refused(sound, key, value):
    config = json.loads(sound[0][CONFIG]) | {key: value}
    assert refused(write(sound, **{CONFIG: json.dumps(config).encode()}))


# --- adapter_model.safetensors -------------------------------------------------------


@settings(max_examples=300)
@given(st.data())
def test_weights_cut_short_are_refused(sound, data):
    whole = sound[0][WEIGHTS]
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert refused(write(sound, **{WEIGHTS: cut}))


def moved(key, to):
    return lambda tensors: {to if k == key else k: t for k, t in tensors.items()}


def replaced(key, change):
    return lambda tensors: tensors | {key: change(tensors[key]).clone()}


def changed(tensors, key, how):
    """The tensors with a fault of one kind at one key."""
    tensor, module = tensors[key], key.rpartition(".")[0]
    number = key.split(".layers.")[1][0]
    faults = {
        "missing": lambda tensors: {k: t for k, t in tensors.items() if k != key},
        "renamed": moved(key, f"{key}s"),
        "elsewhere": moved(key, key.replace(f"layers.{number}", "layers.7")),
        "extra": lambda tensors: tensors | {f"{module}.more": tensor.clone()},
        "nan": replaced(key, lambda t: t.where(t != t.max(), float("nan"))),
        "inf": replaced(key, lambda t: t.where(t != t.max(), float("inf"))),
        "flat": replaced(key, lambda t: t.reshape(-1, 1, 1)),
        "wider": replaced(key, lambda t: torch.cat([t, t])),
    }
    return faults[how](tensors)


FAULTS = "missing renamed elsewhere extra nan inf flat wider".split()


@settings(max_examples=500)
@given(st.data())
def test_faulty_numbers_are_refused(sound, data):
    tensors = load(sound[0][WEIGHTS])
    key = data.draw(st.sampled_from(sorted(tensors)))
    how = data.draw(st.sampled_from(FAULTS))
    assume(not (how == "wider" and key.endswith("_B")))  # as wide as the base says
    assert refused(write(sound, **{WEIGHTS: save(changed(tensors, key, how))})), how


def test_files_missing_or_directories_are_refused(tmp_path, sound, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a path that could be a repository of the hub
    for name, other in ((CONFIG, WEIGHTS), (WEIGHTS, CONFIG)):
        folder = Path("some", name)
        folder.mkdir(parents=True)
        (folder / other).write_bytes(sound[0][other])
        assert refused(folder)
        (folder / name).mkdir()
        assert refused(folder)
    assert refused(tmp_path)


# --- on a base, through PEFT ---------------------------------------------------------

# PEFT adds the adapter's name to what it knows by prefix, so these reach the model.
AT_LOADING = "missing renamed elsewhere extra nan inf wider".split()


@pytest.mark.parametrize("how", AT_LOADING)
@pytest.mark.parametrize("name", ["rotation", "rotation_base", "bias", "q_proj_B"])
def test_peft_does_not_load_faulty_numbers(sound, how, name):
    tensors = load(sound[0][WEIGHTS])
    key = next(key for key in sorted(tensors) if key.endswith((f".{name}", f"_{name}")))
    folder = write(sound, **{WEIGHTS: save(changed(tensors, key, how))})
    with pytest.raises(ValueError, match="the adapter") as error:
        PeftModel.from_pretrained(build_model(), folder)
    refusal(error.value)


@pytest.mark.parametrize("kept", [None, "layers.1", "intv_1", "intv_lora"])
def test_peft_does_not_load_part_of_an_adapter(sound, kept):
    tensors = {k: t for k, t in load(sound[0][WEIGHTS]).items() if kept and kept in k}
    folder = write(sound, **{WEIGHTS: save(tensors)})
    with pytest.raises(ValueError, match="missing tensor|hold no LoReFT adapter"):
        PeftModel.from_pretrained(build_model(), folder)


def test_peft_does_not_fill_in_settings(sound):
    config = json.loads(sound[0][CONFIG])
    del config["positions"]
    folder = write(sound, **{CONFIG: json.dumps(config).encode()})
    with pytest.raises(ValueError, match="positions is missing; write what"):
        PeftModel.from_pretrained(build_model(), folder)


# --- pyreft's ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    build_adapter(build_model(), rank=2, layers=[1]).save_pretrained(folder)
    out = tmp_path_factory.mktemp("theirs") / "out"
    export_adapter(str(folder), str(out))
    (out / CONFIG).unlink()
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    return files, out


def imported(theirs, **changed_files):
    """Whether it is; what is not is refused with a message that says where."""
    folder = write(theirs, **changed_files)
    try:
        with torch.device("meta"):
            base = build_model()
        from_pyreft(folder, base, positions="f2+l3")
    except ValueError as error:
        assert "DIR: " in refusal(error)
        return False
    return True


def test_pyrefts_undamaged_directory_is_imported(theirs):
    assert imported(theirs)


@settings(max_examples=60)
@given(st.data())
def test_pyrefts_files_cut_short_are_refused(theirs, data):
    name = data.draw(st.sampled_from(sorted(theirs[0])))
    whole = theirs[0][name].rstrip()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert not imported(theirs, **{name: cut})
