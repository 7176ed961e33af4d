"""Decoder layers that edit their own output.

Shapes: T tokens, K sides, R rank, D hidden size.
"""

import numpy as np
import pytest
import torch
from stub_engine import (
    CAPACITY,
    HIDDEN,
    LAYERS,
    GPTNeoXLayer,
    LlamaDecoderLayer,
    build_layers,
)
from torch.testing import assert_close

from axolotl_reft.core.affine import AffineStack
from axolotl_reft.serving.edited_rows import EditedRows, RowsOfEdit
from axolotl_reft.serving.layers import LayerEdits

ADAPTERS, RANK, TOKENS = 3, 4, 6


def build_rows():
    return EditedRows(CAPACITY, 2 * ADAPTERS, torch.device("cpu"))


def edit_layers(layers, rows, count=LAYERS):
    name = type(layers[0]).__name__
    return LayerEdits(layers, name, count, rows, ADAPTERS, RANK, HIDDEN)


def build_stack(sides=2, rank=RANK, has_m=True):
    m_KRD, p_KRD = torch.randn(2, sides, rank, HIDDEN)
    return AffineStack(m_KRD if has_m else None, torch.randn(sides, rank), p_KRD)


def edited(x_TD, stack, side, rows):
    """The rows as this side of the stack edits them."""
    x_TD = x_TD.clone()
    source = stack.b_KR[side].expand(len(rows), -1)
    if stack.m_KRD is not None:
        source = source + x_TD[rows] @ stack.m_KRD[side].T
    x_TD[rows] += source @ stack.p_KRD[side]
    return x_TD


def set_rows(rows, **by_edit):
    rows.set(RowsOfEdit(int(e[1:]), np.array(at)) for e, at in by_edit.items())


@torch.no_grad()
def test_a_layer_of_vllm_hands_on_the_edited_sum():
    layers, rows = build_layers(), build_rows()
    hidden_TD, residual_TD = torch.randn(2, TOKENS, HIDDEN)
    before_TD = sum(layers[1](hidden_TD, residual_TD))
    edits, stack = edit_layers(layers, rows), build_stack()
    edits.load(1, {1: stack})
    set_rows(rows, _2=[0, 3], _3=[5])
    expected_TD = edited(edited(before_TD, stack, 0, [0, 3]), stack, 1, [5])
    assert_close(sum(layers[1](hidden_TD, residual_TD)), expected_TD)
    # The layers that the adapter does not edit.
    set_rows(rows)
    before_TD = sum(layers[0](hidden_TD, residual_TD))
    set_rows(rows, _2=[0, 3], _3=[5])
    assert_close(sum(layers[0](hidden_TD, residual_TD)), before_TD)


@torch.no_grad()
def test_a_layer_of_transformers_gives_the_edited_output():
    layers, rows = build_layers(GPTNeoXLayer), build_rows()
    hidden_1TD = torch.randn(1, TOKENS, HIDDEN)
    before_TD = layers[2](hidden_1TD)[0]
    edits, stack = edit_layers(layers, rows), build_stack(sides=1)
    edits.load(0, {2: stack})
    set_rows(rows, _0=[1, 2])
    assert_close(layers[2](hidden_1TD)[0], edited(before_TD, stack, 0, [1, 2]))


@torch.no_grad()
def test_an_adapter_leaves_nothing_of_the_one_that_had_its_slot():
    layers, rows = build_layers(), build_rows()
    edits = edit_layers(layers, rows)
    hidden_TD, residual_TD = torch.randn(2, TOKENS, HIDDEN)
    before = [sum(layer(hidden_TD, residual_TD)) for layer in layers]
    neighbours = {slot: build_stack() for slot in (0, 2)}
    for slot, stack in neighbours.items():
        edits.load(slot, dict.fromkeys(range(LAYERS), stack))
    edits.load(1, {layer: build_stack() for layer in range(LAYERS)})
    smaller = build_stack(sides=1, rank=2, has_m=False)
    edits.load(1, {1: smaller})
    set_rows(rows, _0=[0], _1=[1], _2=[2], _3=[3], _4=[4], _5=[5])
    for number, layer in enumerate(layers):
        expected_TD = before[number]
        for slot, stack in neighbours.items():
            for side in (0, 1):
                edit = 2 * slot + side
                expected_TD = edited(expected_TD, stack, side, [edit])
        if number == 1:
            expected_TD = edited(expected_TD, smaller, 0, [2])
        assert_close(sum(layer(hidden_TD, residual_TD)), expected_TD)


def test_a_layer_stays_of_its_class_and_saves_what_it_did():
    layers = build_layers()
    names = list(layers.state_dict())
    edit_layers(layers, build_rows())
    assert all(isinstance(layer, LlamaDecoderLayer) for layer in layers)
    assert list(layers.state_dict()) == names
    # One class for all, so that they are compiled once.
    assert len({type(layer) for layer in layers}) == 1


@pytest.mark.parametrize("layer_class", [LlamaDecoderLayer, GPTNeoXLayer])
def test_another_number_of_layers_is_refused(layer_class):
    name = layer_class.__name__
    with pytest.raises(
        ValueError,
        match=f"LoReFT: ModuleList has 3 layers of the class {name}, expected 4; serve "
        "without --lora-target-modules loreft",
    ):
        edit_layers(build_layers(layer_class), build_rows(), count=4)


@torch.no_grad()
def test_a_compiled_model_is_one_graph_that_is_edited():
    layers, rows = build_layers(), build_rows()
    edit_layers(layers, rows).load(0, dict.fromkeys(range(LAYERS), build_stack()))

    def model(hidden_TD):
        residual_TD = None
        for layer in layers:
            hidden_TD, residual_TD = layer(hidden_TD, residual_TD)
        return hidden_TD + residual_TD

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    hidden_TD = torch.randn(TOKENS, HIDDEN)
    assert_close(compiled(hidden_TD), model(hidden_TD))
    set_rows(rows, _0=[0, 1], _1=[4])
    before_TD = compiled(hidden_TD)
    assert_close(before_TD, model(hidden_TD))
    set_rows(rows)
    assert not torch.allclose(compiled(hidden_TD), before_TD)
    torch._dynamo.reset()
