"""Adapters of a server: what is refused, what they are known by, and their matrices."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, LAYERS, build_adapter, build_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from axolotl_reft.core.interventions import Intervention
from axolotl_reft.serving import adapters
from axolotl_reft.serving.adapters import (
    AdapterStore,
    ServedBase,
    is_loreft_number,
    load_edits,
    load_spec,
)
from axolotl_reft.settings.spec import INTERVENTIONS

BASE = ServedBase("base", HIDDEN, LAYERS, max_rank=4)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def save(tmp_path):
    """A function that saves a random adapter, and returns its model and directory."""

    def save(name="adapter", **settings):
        model = build_adapter(build_model(), **{"rank": 3} | settings)
        model.save_pretrained(tmp_path / name)
        return model, str(tmp_path / name)

    return save


@pytest.fixture
def directory(save):
    return save()[1]


def change_tensors(directory):
    path = f"{directory}/{WEIGHTS}"
    save_file({key: t + 1 for key, t in load_file(path).items()}, path)


def hide_tensors(directory):
    os.rename(f"{directory}/{WEIGHTS}", f"{directory}/hidden")


def change_config(directory, **settings):
    path = f"{directory}/{CONFIG}"
    with open(path) as file:
        config = json.load(file)
    with open(path, "w") as file:
        json.dump(config | settings, file)


def test_a_loaded_adapter_is_one_block_of_memory(directory):
    edits = load_edits(directory, BASE.read(directory, "a").number)
    tensors = [tensor for stack in edits.values() for tensor in stack]
    assert len(tensors) == 3 * LAYERS
    (block,) = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert tensors[0].untyped_storage().nbytes() == sum(t.nbytes for t in tensors)


def test_a_number_is_made_from_the_files_alone(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "copy")
    number = BASE.read(directory, "a").number
    assert BASE.read(str(tmp_path / "copy"), "b").number == number
    assert 2**62 <= number < 2**63
    assert is_loreft_number(number) and not is_loreft_number(1)


@pytest.mark.parametrize(
    "change", [change_tensors, lambda d: change_config(d, positions="f1+l1")]
)
def test_another_content_is_another_number(directory, change):
    before = BASE.read(directory, "a").number
    change(directory)
    assert BASE.read(directory, "a").number != before


def test_the_number_tells_where_a_file_ends(tmp_path):
    numbers = set()
    for config, weights in ((b"ab", b"c"), (b"a", b"bc")):
        (tmp_path / CONFIG).write_bytes(config)
        (tmp_path / WEIGHTS).write_bytes(weights)
        numbers.add(adapters._digest(str(tmp_path), "adapter"))
    assert len(numbers) == 2


def test_a_store_reads_an_adapter_again_when_its_files_change(directory, monkeypatch):
    read, count = ServedBase.read, []
    monkeypatch.setattr(
        ServedBase, "read", lambda *given: count.append(1) or read(*given)
    )
    store = AdapterStore(BASE)
    first = store.get(directory, "a")
    assert store.get(directory, "a") is first and len(count) == 1
    change_tensors(directory)
    second = store.get(directory, "a")
    assert second.number != first.number and len(count) == 2


def test_the_engine_loads_what_was_accepted_whatever_becomes_of_the_files(directory):
    store = AdapterStore(BASE)
    accepted = store.get(directory, "a")
    before = load_edits(directory, accepted.number)
    change_tensors(directory)
    again = store.get(directory, "a")
    shutil.rmtree(directory)
    loaded = load_edits(accepted.directory, accepted.number)
    for layer, stack in before.items():
        for tensor, expected in zip(loaded[layer], stack, strict=True):
            assert (tensor is None) == (expected is None)
            assert tensor is None or torch.equal(tensor, expected)
    load_edits(again.directory, again.number)


def test_copies_that_no_request_used_for_an_hour_are_deleted(directory, monkeypatch):
    clock, store, states = [0.0], AdapterStore(BASE), []
    monkeypatch.setattr(adapters.time, "monotonic", lambda: clock[0])
    for clock[0] in (0.0, 3000.0, 3601.0):
        states.append(store.get(directory, "a").directory)
        change_tensors(directory)
    assert [Path(state).exists() for state in states] == [False, True, True]
    clock[0] = 9999.0
    other = shutil.copytree(directory, f"{directory}-2")
    store.get(directory, "a")
    assert Path(store.get(directory, "a").directory).exists()
    assert Path(store.get(other, "b").directory).exists()


@pytest.mark.parametrize("change", [change_tensors, hide_tensors])
def test_files_that_change_before_they_are_copied_are_not_kept(
    directory, monkeypatch, change
):
    read = ServedBase.read

    def read_and_change(*given):
        adapter = read(*given)
        change(directory)
        return adapter

    store = AdapterStore(BASE)
    monkeypatch.setattr(ServedBase, "read", read_and_change)
    with pytest.raises(ValueError, match="changed while they were read; load it again"):
        store.get(directory, "a")
    monkeypatch.setattr(ServedBase, "read", read)
    if change is hide_tensors:
        os.rename(f"{directory}/hidden", f"{directory}/{WEIGHTS}")
    adapter = store.get(directory, "a")
    load_edits(adapter.directory, adapter.number)


def test_a_store_does_not_keep_what_it_refused(directory):
    store = AdapterStore(BASE)
    change_config(directory, rank=5)
    with pytest.raises(ValueError, match="has shape"):
        store.get(directory, "a")
    change_config(directory, rank=3)
    assert store.get(directory, "a").spec.rank == 3


LORA = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"component": "mlp_output"},
            "component: mlp_output is edited within a layer, and a server edits "
            "layers' outputs; train with component: block_output, or use generate of "
            "transformers",
        ),
        (
            {"act_fn": "relu"},
            "act_fn: relu makes the edit other than linear; train with act_fn: null, "
            "or use generate of transformers",
        ),
        (
            {"lora": LORA},
            f"lora: {LORA} is not LoReFT, and would be left out; train without it, or "
            "use generate of transformers",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            "modules_to_save: ['lm_head'] is not LoReFT, and would be left out; train "
            "without it, or use generate of transformers",
        ),
        (
            {"rank": {"0": 5, "all": 2}},
            "its rank 5 is above the server's 4; start the server with --max-lora-rank "
            "8",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_more_than_edits_of_the_residual_stream_is_refused(save, settings, message):
    _, directory = save(**settings)
    expected = f"LoReFT adapter 'a' cannot be served: {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        BASE.read(directory, "a")


def test_weights_beside_the_interventions_are_refused(save):
    model, directory = save()
    model.save_pretrained(directory, save_embedding_layers=True)
    with pytest.raises(
        ValueError,
        match="its weights hold 'base_model.model.lm_head.weight' beside LoReFT, which "
        "would be left out; train on a base that has it, or use generate of",
    ):
        BASE.read(directory, "a")


def save_lora(directory):
    get_peft_model(
        build_model(), LoraConfig(target_modules=["q_proj"])
    ).save_pretrained(directory)


def cut_weights(directory):
    with open(f"{directory}/{WEIGHTS}", "r+b") as file:
        file.truncate(100)


def set_to_nan(directory):
    path = f"{directory}/{WEIGHTS}"
    save_file({key: t * torch.nan for key, t in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "cannot be read .No such file or directory.; name a run's"),
        (save_lora, "is LORA, not LOREFT; name one that was trained with adapter:"),
        (cut_weights, "weights in '.*' are missing or damaged .*; save the adapter"),
        (set_to_nan, "not finite|NaN|infinite"),
        (lambda d: change_config(d, positions="p"), "positions: 'p' is not understood"),
        (
            lambda d: change_config(d, rank=2),
            r"has shape \(3,\), expected \(2,\); save the",
        ),
    ],
)
def test_a_broken_directory_is_refused(directory, change, message):
    change(directory)
    with pytest.raises(ValueError, match=f"^LoReFT adapter 'a': .*({message})"):
        BASE.read(directory, "a")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (ServedBase("b", 48, LAYERS, 4), "of hidden size 32, this base has 48"),
        (ServedBase("b", HIDDEN, 2, 4), r"holds layers \[0, 1, 2\], but on this base"),
    ],
)
def test_an_adapter_of_another_base_is_refused(directory, base, message):
    with pytest.raises(ValueError, match=f"^LoReFT adapter 'a': .*{message}"):
        base.read(directory, "a")


def test_files_that_change_while_they_are_read_are_refused(directory, monkeypatch):
    check = adapters.check_adapter_fits

    def change_and_check(*given):
        change_tensors(directory)
        return check(*given)

    monkeypatch.setattr(adapters, "check_adapter_fits", change_and_check)
    with pytest.raises(
        ValueError, match="changed while they were read; load it again when they are"
    ):
        BASE.read(directory, "a")


@pytest.mark.parametrize(
    "change", [change_tensors, lambda d: change_config(d, lora={})]
)
@pytest.mark.parametrize("load", [load_spec, load_edits])
def test_files_that_a_request_was_not_accepted_for_are_refused(directory, load, change):
    number = BASE.read(directory, "a").number
    change(directory)
    with pytest.raises(
        ValueError,
        match=f"the files in '{directory}' changed after a request for them was "
        "accepted; send it again, and save another adapter in another directory",
    ):
        load(directory, number)


def test_an_adapter_s_settings(save):
    _, directory = save(positions="l2", turns="first")
    served = BASE.read(directory, "a")
    assert load_spec(directory, served.number) == served.spec
    assert str(served.spec.positions) == "l2" and not served.spec.turns.every


@pytest.mark.parametrize("name", INTERVENTIONS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"tied_weights": False}, {"rank": {"0-1": 2, "2": 4}}, {"layers": "0,2"}],
    ids=str,
)
def test_its_matrices_edit_as_the_model_s_interventions(save, name, settings):
    model, directory = save(intervention=name, **settings)
    edits = load_edits(directory, BASE.read(directory, "a").number)
    interventions = {}
    for path, module in model.named_modules():
        if isinstance(module, Intervention):
            layer = int(re.search(r"layers\.(\d+)\.", path)[1])
            interventions.setdefault(layer, []).append(module)
    assert list(edits) == list(interventions)
    h_ND = torch.randn(5, HIDDEN)
    for layer, (m_KRD, b_KR, p_KRD) in edits.items():
        assert b_KR.shape[0] == len(interventions[layer])
        for side, intervention in enumerate(interventions[layer]):
            source_NR = b_KR[side].expand(5, -1)
            if m_KRD is not None:
                source_NR = source_NR + h_ND @ m_KRD[side].T
            with torch.no_grad():
                assert_close(h_ND + source_NR @ p_KRD[side], intervention(h_ND))
        assert not (b_KR.requires_grad or p_KRD.requires_grad)
