"""Adapters made on the meta device, or in ``init_empty_weights``, and then filled."""

import copy

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from conftest import build_adapter, build_model
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM

from axolotl_reft import LoreftConfig
from axolotl_reft.core.interventions import Intervention
from axolotl_reft.settings.spec import INTERVENTIONS

SETTINGS = {kind: {"intervention": kind} for kind in INTERVENTIONS}
SETTINGS["with LoRA"] = {"lora": {"r": 2}}


@pytest.fixture(params=list(SETTINGS))
def settings(request):
    return {"task_type": "CAUSAL_LM", "positions": "f2+l3", **SETTINGS[request.param]}


def empty_base():
    return AutoModelForCausalLM.from_config(build_model().config)


def on_meta(settings):
    with torch.device("meta"):
        return get_peft_model(empty_base(), LoreftConfig(**settings))


def in_empty_weights(settings, **options):
    with init_empty_weights(**options):
        return get_peft_model(empty_base(), LoreftConfig(**settings))


def fill(model, trained):
    """Load everything, and what is in no state dict: the base's rotary frequencies."""
    model.load_state_dict(trained.state_dict(), assign=True)
    filled = dict(trained.named_buffers())
    for name, buffer in model.named_buffers():
        if "inv_freq" in name:
            path, _, last = name.rpartition(".")
            model.get_submodule(path)._buffers[last] = filled[name]
        assert not buffer.is_meta or "inv_freq" in name
    return model


def to_empty(settings, trained, path):
    return fill(on_meta(settings).to_empty(device="cpu"), trained)


def saved(trained, path):
    trained.save_pretrained(path)
    return path


def dispatched(settings, trained, path):
    torch.save(trained.state_dict(), path / "model.bin")
    model = in_empty_weights(settings)
    load_checkpoint_and_dispatch(model, str(path / "model.bin"), device_map={"": "cpu"})
    return fill(model, trained)


def by_pefts_state_dict(settings, trained, path):
    model = get_peft_model(
        build_model(), LoreftConfig(**settings), low_cpu_mem_usage=True
    )
    state = get_peft_model_state_dict(trained)
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    return model


def onto_an_empty_base(settings, trained, path):
    with torch.device("meta"):
        base = empty_base()
    path = saved(trained, path)
    return fill(PeftModel.from_pretrained(base, path, low_cpu_mem_usage=True), trained)


WAYS = {
    "meta, assigned": lambda s, trained, _: fill(on_meta(s), trained),
    "meta, to_empty": to_empty,
    "moved to meta": lambda s, trained, _: fill(
        copy.deepcopy(trained).to("meta"), trained
    ),
    "init_empty_weights": lambda s, trained, _: fill(in_empty_weights(s), trained),
    "with buffers": lambda s, trained, _: fill(
        in_empty_weights(s, include_buffers=True), trained
    ),
    "dispatched": dispatched,
    "low_cpu_mem_usage": by_pefts_state_dict,
    "an empty base": onto_an_empty_base,
}


@pytest.mark.parametrize("way", list(WAYS))
@torch.no_grad()
def test_filled_it_is_the_adapter_that_was_saved(way, settings, tmp_path, tokens):
    trained = build_adapter(build_model(), **settings)
    expected = trained(tokens(2, 9)).logits
    model = WAYS[way](settings, trained, tmp_path).eval()
    assert torch.equal(model(tokens(2, 9)).logits, expected)


@pytest.mark.parametrize("way", ["on meta", "on the CPU, the base on meta"])
def test_what_to_empty_leaves_is_a_new_adapter(way, settings, recwarn):
    """And not what was in memory; PEFT's LoRA is that."""
    if way == "on meta":
        model = on_meta(settings)
    else:
        with torch.device("meta"):
            base = empty_base()
        model = get_peft_model(base, LoreftConfig(**settings))
    recwarn.clear()
    model.to_empty(device="cpu")
    told = [str(w.message) for w in recwarn if "to_empty drops" in str(w.message)]
    assert bool(told) == (way != "on meta")
    found = [m for m in model.modules() if isinstance(m, Intervention)]
    assert found
    for intervention in found:
        fresh = type(intervention)(embed_dim=32, low_rank_dimension=8)
        for name, number in fresh.state_dict().items():
            got = intervention.state_dict()[name]
            assert not got.is_meta and got.any() == number.any()
            assert got.abs().max() <= 1.0
        if intervention.kind.has_rotation:
            rotation = intervention.rotation_matrix()
            assert torch.allclose(rotation.T @ rotation, torch.eye(8), atol=1e-5)
    for name, number in model.named_parameters():
        if "intv_lora" in name:
            assert bool(number.any()) == name.endswith("_A")
            assert number.abs().max() <= 1.0


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
@pytest.mark.parametrize("turns", ["every", "first"])
def test_shapes_are_found_on_meta(positions, turns, tokens):
    settings = {"task_type": "CAUSAL_LM", "positions": positions, "turns": turns}
    logits = on_meta(settings).eval()(tokens(2, 9).to("meta")).logits
    assert logits.is_meta and logits.shape[:2] == (2, 9)


@pytest.mark.parametrize("act_fn", [None, "gelu"])
@torch.no_grad()
def test_an_adapter_that_was_not_filled_computes_nothing(act_fn, tokens):
    """torch's own ``linear`` with a weight on meta returns what was in memory."""
    config = LoreftConfig(act_fn=act_fn, lora={"r": 2})
    model = get_peft_model(build_model(), config, low_cpu_mem_usage=True)
    with pytest.raises(RuntimeError, match="meta"):
        model.eval()(tokens(2, 9))
