"""Damaged adapter directories, ours and pyreft's: each is refused, or is undamaged."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, LAYERS, build_adapter, build_model
from fuzzing import VALUES, refusal
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load, save

from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.core.tensors import NUMBERS
from axolotl_reft.exchange.directory import export_adapter, from_pyreft
from axolotl_reft.saved.directory import check_adapter_fits

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SETTINGS = {
    "positions": "f2+l1",
    "tied_weights": False,
    "rank": 2,
    "lora": {"r": 2, "target_modules": ["q_proj"]},
}
# What LoReFT computes depends on; PEFT's own notes may be anything.
KEYS = "layers positions rank turns tied_weights intervention component dropout act_fn"


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


def test_the_table_of_numbers_is_that_of_the_interventions():
    for kind, shapes in NUMBERS.items():
        made = INTERVENTION_CLASSES[kind](embed_dim=5, low_rank_dimension=2)
        sizes = {"D": 5, "R": 2}
        expected = {name: tuple(map(sizes.get, axes)) for name, axes in shapes.items()}
        assert {
            name: tuple(t.shape) for name, t in made.state_dict().items()
        } == expected
    assert NUMBERS.keys() == INTERVENTION_CLASSES.keys()


# --- adapter_config.json -------------------------------------------------------------


@settings(max_examples=200)
@given(st.data())
def test_a_configuration_cut_short_or_overwritten_is_refused(sound, data):
    whole = sound[0][CONFIG]
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert refused(write(sound, **{CONFIG: cut}))


@settings(max_examples=200)
@given(
    st.binary(max_size=20)
    | VALUES.map(lambda v: json.dumps(v, default=str, skipkeys=True)[:9999])
)
@example("[" * 100_000)
@example('{"peft_type": "LOREFT"}')
@example('{"peft_type": ["LOREFT"]}')
def test_a_configuration_that_is_something_else_is_refused(sound, content):
    content = content if isinstance(content, bytes) else content.encode()
    assert refused(write(sound, **{CONFIG: content}))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_other_encodings_are_refused(sound, encoding):
    content = sound[0][CONFIG].decode().encode(encoding)
    assert refused(write(sound, **{CONFIG: content}))


@pytest.mark.parametrize("key", [*KEYS.split(), "peft_type"])
def test_a_missing_key_is_refused(sound, key):
    config = json.loads(sound[0][CONFIG])
    del config[key]
    if key == "turns":  # newer than the first adapters
        pytest.skip("has a default that is what older adapters did")
    assert refused(write(sound, **{CONFIG: json.dumps(config).encode()}))


@pytest.mark.parametrize("key", ["lora_alpha", "r", "zzz", "Rank", "rank "])
def test_an_unknown_key_is_refused(sound, key):
    config = json.loads(sound[0][CONFIG]) | {key: 8}
    assert refused(write(sound, **{CONFIG: json.dumps(config).encode()}))


def test_a_key_written_twice_is_refused(sound):
    content = sound[0][CONFIG].replace(b'"rank": 2', b'"rank": 2, "rank": 4')
    assert refused(write(sound, **{CONFIG: content}))


@pytest.mark.parametrize("method", ["LORA", "IA3", "loreft", "", None, 3])
def test_another_method_is_refused(sound, method):
    config = json.loads(sound[0][CONFIG]) | {"peft_type": method}
    assert refused(write(sound, **{CONFIG: json.dumps(config).encode()}))


@settings(max_examples=400)
@given(st.sampled_from(KEYS.split()), VALUES)
@example("rank", 3)
@example("intervention", "direft")
@example("tied_weights", True)
@example("positions", "f3")
@example("layers", [0, 1])
def test_another_value_is_refused_or_fits_the_numbers(sound, key, value):
    config = json.loads(sound[0][CONFIG])
    content = json.dumps(config | {key: value}, default=str, skipkeys=True)
    value = json.loads(content)[key]
    if not refused(write(sound, **{CONFIG: content.encode()})):
        same = type(value) is type(config[key]) and value == config[key]
        assert same or key in ("dropout", "turns", "act_fn") or value == "0-2", value


# --- adapter_model.safetensors -------------------------------------------------------


@settings(max_examples=300)
@given(st.data())
def test_weights_cut_short_are_refused(sound, data):
    whole = sound[0][WEIGHTS]
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert refused(write(sound, **{WEIGHTS: cut}))


@settings(max_examples=200)
@given(st.integers(0, 2**64 - 1) | st.integers(0, 5000))
def test_a_header_whose_length_lies_is_refused(sound, length):
    whole = sound[0][WEIGHTS]
    if length != struct.unpack("<Q", whole[:8])[0]:
        assert refused(write(sound, **{WEIGHTS: struct.pack("<Q", length) + whole[8:]}))


@settings(max_examples=300)
@given(st.data())
def test_a_header_with_other_bytes_is_refused_or_says_the_same(sound, data):
    whole = bytearray(sound[0][WEIGHTS])
    size = struct.unpack("<Q", whole[:8])[0]
    whole[data.draw(st.integers(8, 7 + size))] = data.draw(st.integers(0, 255))
    if not refused(write(sound, **{WEIGHTS: bytes(whole)})):
        assert shapes(load(bytes(whole))) == shapes(load(sound[0][WEIGHTS]))


def shapes(tensors):
    """By layer and name: which model the layers are in, a file alone cannot tell."""
    return {tuple(k.split(".")[-3:]): tuple(t.shape) for k, t in tensors.items()}


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
        "below": moved(key, f"{key}.weight"),
        "elsewhere": moved(key, key.replace(f"layers.{number}", "layers.7")),
        "extra": lambda tensors: tensors | {f"{module}.more": tensor.clone()},
        "stray": lambda tensors: tensors | {"stray": tensor.clone()},
        "nan": replaced(key, lambda t: t.where(t != t.max(), float("nan"))),
        "inf": replaced(key, lambda t: t.where(t != t.max(), float("inf"))),
        "empty": replaced(key, lambda t: t[:0]),
        "flat": replaced(key, lambda t: t.reshape(-1, 1, 1)),
        "wider": replaced(key, lambda t: torch.cat([t, t])),
    }
    cast = replaced(key, lambda t: t.to(getattr(torch, how)))
    return faults.get(how, cast)(tensors)


FAULTS = (
    "missing renamed below elsewhere extra stray nan inf empty flat wider "
    "int64 uint8 bool float8_e4m3fn"
).split()


@settings(max_examples=500)
@given(st.data())
def test_faulty_numbers_are_refused(sound, data):
    tensors = load(sound[0][WEIGHTS])
    key = data.draw(st.sampled_from(sorted(tensors)))
    how = data.draw(st.sampled_from(FAULTS))
    assume(not (how == "wider" and key.endswith("_B")))  # as wide as the base says
    assert refused(write(sound, **{WEIGHTS: save(changed(tensors, key, how))})), how


def test_a_base_of_a_rotation_without_its_signs_is_refused(sound):
    tensors = load(sound[0][WEIGHTS])
    next(t for k, t in tensors.items() if "rotation_base" in k).zero_()
    assert refused(write(sound, **{WEIGHTS: save(tensors)}))


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


def test_weights_in_a_pickle_alone_are_refused(sound):
    folder = write(sound)
    (folder / WEIGHTS).unlink()
    torch.save(load(sound[0][WEIGHTS]), folder / "adapter_model.bin")
    assert refused(folder)
    os.remove(folder / "adapter_model.bin")


# --- on a base, through PEFT ---------------------------------------------------------

# PEFT adds the adapter's name to what it knows by prefix, so these reach the model.
AT_LOADING = (
    "missing",
    "renamed",
    "elsewhere",
    "extra",
    "nan",
    "inf",
    "wider",
    "int64",
)


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
    with pytest.raises(ValueError, match="would be random; save the adapter again"):
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
@given(
    st.sampled_from(["sorted_keys", "intervention_types", "representations"]), VALUES
)
@example("intervention_types", [["a"]])
@example("sorted_keys", [[]])
@example("sorted_keys", [3])
def test_pyrefts_configuration_is_refused_when_it_is_none(theirs, key, value):
    config = json.loads(theirs[0]["config.json"])
    content = json.dumps(config | {key: value}, default=str, skipkeys=True).encode()
    assert not imported(theirs, **{"config.json": content})


@settings(max_examples=60)
@given(st.data())
def test_pyrefts_files_cut_short_are_refused(theirs, data):
    name = data.draw(st.sampled_from(sorted(theirs[0])))
    whole = theirs[0][name].rstrip()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert not imported(theirs, **{name: cut})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((2, HIDDEN), float("nan")),
        torch.zeros(2, HIDDEN).to_sparse(),
        torch.zeros(2, HIDDEN, device="meta"),
        torch.zeros(1).expand(2, 10**12),
        torch.zeros(2, HIDDEN, dtype=torch.complex64),
        torch.zeros(2, HIDDEN).to(torch.float8_e4m3fn),
        torch.zeros(2, HIDDEN, dtype=torch.int64),
        torch.zeros(()),
        3.0,
        [1.0],
    ],
    ids=str,
)
def test_pyrefts_tensors_that_are_none_are_refused(theirs, tmp_path, tensor):
    name = next(name for name in theirs[0] if name.endswith(".bin"))
    folder = write(theirs)
    state = torch.load(folder / name, weights_only=True)
    torch.save(state | {"weight": tensor}, tmp_path / name)
    assert not imported(theirs, **{name: (tmp_path / name).read_bytes()})
