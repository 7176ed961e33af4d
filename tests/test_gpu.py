"""What only a GPU shows. Skipped without one."""

import copy
import warnings

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, build_adapter, build_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_reft.serving.edited_rows import EditedRows, edit_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def batch(length=24, prompt=10, packed=True):
    """Rows of two samples, or of one."""
    torch.manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (2, length), device="cuda")
    place = torch.arange(length, device="cuda") % (length // 2 if packed else length)
    place = place.expand(2, -1)
    inputs = {"input_ids": ids, "labels": ids.where(place >= prompt, -100)}
    return inputs | ({"position_ids": place} if packed else {})


def step(model, inputs, **options):
    model.zero_grad()
    loss = model(**inputs, **options, use_cache=False).loss
    loss.backward()
    numbers = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss} | numbers


def on_gpu(**settings):
    return build_adapter(build_model().cuda(), **settings).train()


@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_a_compiled_step_is_one_graph_and_the_same(component):
    torch._dynamo.reset()
    model, inputs = on_gpu(component=component), batch()
    expected = step(model, inputs)
    model.compile(fullgraph=True)
    assert_close(step(model, inputs), expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


def test_flex_attention_keeps_packed_samples_apart():
    base = build_model(head_dim=16).cuda()
    model, inputs = build_adapter(base).train(), batch()
    expected = step(model, inputs)
    base.set_attn_implementation("flex_attention")
    torch._dynamo.reset()
    assert_close(step(model, inputs), expected, atol=2e-3, rtol=2e-3)
    apart = {name: torch.cat(tensor.chunk(2, 1)) for name, tensor in inputs.items()}
    assert_close(step(model, apart), expected, atol=2e-3, rtol=2e-3)


def test_a_base_in_4_bits_hands_gradients_down(tmp_path):
    build_model(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4"
        ),
        device_map={"": 0},
        dtype=torch.float32,
    )
    whole = copy.deepcopy(base).dequantize().float().cuda()
    got = step(build_adapter(base).train(), batch())
    expected = step(build_adapter(whole).train(), batch())
    for name, value in expected.items():
        close = 1e-3 * value.abs().max().item()
        assert_close(got[name], value, atol=close, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_keeps_the_adapter_in_float32(dtype):
    expected = step(on_gpu(), batch())
    with torch.autocast("cuda", dtype):
        got = step(on_gpu(), batch())
    assert all(value.dtype == torch.float32 for value in got.values())
    for name, value in expected.items():
        error = (got[name] - value).norm() / value.norm()
        assert error < (0.1 if dtype == torch.bfloat16 else 0.02), name


@pytest.mark.parametrize("packed", [True, False])
def test_a_step_waits_no_more_than_the_base_s(packed):
    """Once the first batch, which is looked at, has gone by."""
    inputs, waits = batch(packed=packed), {}
    model = on_gpu()
    for name in ("warm-up", "ours", "base"):
        told = {"loreft_prompts": 4} if name != "base" else {}
        own = model if name != "base" else build_model().cuda().train()
        step(own, inputs, **told)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step(own, inputs, **told)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits[name] = sum("synchroniz" in str(one.message) for one in caught)
    assert waits["ours"] == waits["base"]


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_served_edit_is_that_of_the_rows_at_each_replay(dtype, is_compiled):
    def forward():
        edit_rows(*layer, *stacks, *rows.tensors)
        return layer[0] + layer[1]

    torch.manual_seed(0)
    rows = EditedRows(64, 4, torch.device("cuda"))
    stacks = [torch.randn(4, 8, *d, device="cuda") / 8 for d in ([96], [], [96])]
    layer = [torch.zeros(16, 96, dtype=dtype, device="cuda") for _ in range(2)]
    run = torch.compile(forward, fullgraph=True) if is_compiled else forward
    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # as a server captures it: nothing is edited
        output = run()
    for step in ({0: [3]}, {1: [0, 5], 3: [15]}, {}, {2: range(16)}):
        rows.set((edit, np.array(list(at))) for edit, at in step.items())
        expected = [torch.randn(16, 96).to(dtype) for _ in layer]
        for tensor, value in zip(layer, expected, strict=True):
            tensor.copy_(value)
        graph.replay()
        on_host = [tensor.cpu() for tensor in (*stacks, *rows.tensors)]
        edit_rows(*expected, *on_host)
        close = 2e-2 if dtype == torch.bfloat16 else 1e-5
        assert_close([t.cpu() for t in layer], expected, atol=close, rtol=close)
        assert torch.equal(output, layer[0] + layer[1])
    torch._dynamo.reset()
