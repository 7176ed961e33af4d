"""The warning, before training, of a base that joins packed samples."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from axolotl.utils.dict import DictDefault

from axolotl_reft.plugin import packing
from axolotl_reft.plugin.plugin import LoreftPlugin

PACKED, FLAT = {"sample_packing": True}, {"batch_flattening": True}
LINEAR = ["linear_attention", "full_attention"]


class Base:
    def __init__(self, config):
        self.config = config

    def forward(self, input_ids, position_ids):
        pass


def base(kind, layer_types=LINEAR):
    config = SimpleNamespace(model_type=kind, layer_types=layer_types)
    config.get_text_config = lambda: config
    return Base(config)


@pytest.fixture
def told(monkeypatch):
    told = []
    monkeypatch.setattr(packing.LOG, "warning", lambda s, *v: told.append(s % v))
    with warnings.catch_warnings():
        yield told


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("jamba", PACKED, "sample_packing: .* by 1 of 2 layers .linear_attention. of "
         "the base, with or without an adapter; set sample_packing: false$"),
        ("jamba", FLAT, "batch_flattening: .*; set batch_flattening: false$"),
        ("qwen3_next", PACKED, "false, or train on a GPU with flash-linear-attention"),
        ("falcon_h1", PACKED, "or train on a GPU with mamba-ssm and causal-conv1d"),
    ],
)  # fmt: skip
def test_it_says_which_layers_and_what_to_do(kind, settings, message, told):
    cfg = DictDefault({"adapter": "loreft", **settings})
    LoreftPlugin().post_model_build(cfg, base(kind))
    assert len(told) == 1 and re.search(message, told[0])


@pytest.mark.parametrize(
    ("kind", "layer_types", "settings"),
    [
        ("jamba", LINEAR, {"sample_packing": False}),
        ("jamba", LINEAR, {"sample_packing": True, "adapter": "lora"}),
        ("qwen3", ["full_attention"] * 2, PACKED),
    ],
)
def test_it_says_nothing_otherwise(kind, layer_types, settings, told):
    cfg = DictDefault({"adapter": "loreft", **settings})
    LoreftPlugin().post_model_build(cfg, base(kind, layer_types))
    assert not told


@pytest.mark.parametrize(
    ("kind", "kernels", "says"),
    [
        ("qwen3_5", False, False),
        ("nemotron_h", True, False),
        ("nemotron_h", False, True),
        ("jamba", True, True),
    ],
)
def test_on_a_gpu_axolotl_tells_some_of_the_samples(
    kind, kernels, says, told, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(packing, "mamba2_seq_idx_kernels_available", lambda: kernels)
    packing.warn_of_packing(DictDefault(PACKED), base(kind))
    assert bool(told) == says
    # Nor does the first forward say it.
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn("LoReFT: packed samples are not kept apart by", stacklevel=1)
    assert not caught
