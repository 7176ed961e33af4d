"""Bases that are stored quantised, in AWQ and in compressed-tensors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from axolotl.utils.dict import DictDefault
from conftest import build_adapter, build_model
from peft import PeftModel
from safetensors.torch import save_file
from training import train
from transformers import AutoModelForCausalLM
from workspace import build_workspace

from axolotl_reft.plugin import quantised

GROUP = 32
# The places of eight numbers in an int32 of AWQ's GEMM layout (arXiv 2306.00978).
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
COMPRESSED = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "strategy": "group", "group_size": GROUP},
        }
    },
    "ignore": ["lm_head"],
    "quantization_status": "frozen",
    "format": "pack-quantized",
}


def pack(numbers_RC):
    """Numbers from 0 to 15, eight in an int32."""
    eights = numbers_RC.long().view(len(numbers_RC), -1, 8)[..., AWQ_ORDER]
    packed = (eights << 4 * torch.arange(8)).sum(-1)
    return packed.where(packed < 2**31, packed - 2**32).int()


def awq_numbers(weight_OI):
    """A weight rounded to 4 bits, asymmetrically, by groups of its inputs."""
    groups_GIO = weight_OI.T.contiguous().view(-1, GROUP, len(weight_OI))
    lowest, highest = groups_GIO.amin(1), groups_GIO.amax(1)
    scales = (highest - lowest) / 15
    zeros = (-lowest / scales).round().clamp(0, 15)
    rounded = (groups_GIO / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    return {
        "qweight": pack(rounded.flatten(0, 1)),
        "qzeros": pack(zeros),
        "scales": scales.half(),
    }


def store_awq(base: Path, to: Path) -> None:
    numbers = {}
    for name, tensor in AutoModelForCausalLM.from_pretrained(base).state_dict().items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix("weight")
            numbers |= {module + key: t for key, t in awq_numbers(tensor).items()}
        else:
            numbers[name] = tensor.half()
    save_file(numbers, to / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP}
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = settings | {"zero_point": True, "version": "gemm"}
    (to / "config.json").write_text(json.dumps(config))


def store_compressed(base: Path, to: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
    )

    model = AutoModelForCausalLM.from_pretrained(base)
    apply_quantization_config(model, QuantizationConfig(**COMPRESSED))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.detach().unflatten(1, (-1, GROUP))
            module.weight_scale.data.copy_(groups.abs().amax(-1) / 7.5)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(to)
    compressor.update_config(to)


STORE = {"awq": store_awq, "compressed-tensors": store_compressed}


@pytest.fixture(params=STORE)
def method(request):
    """A way of storing a base whose package is installed."""
    pytest.importorskip(quantised.NEEDED[request.param][0])
    return request.param


def store(method: str, base: Path, to: Path) -> Path:
    to.mkdir()
    STORE[method](base, to)
    return to


def unpacked(packed):
    """The same model in full precision: its layers' products with the identity."""
    twin = type(packed)(packed.config)
    modules = dict(packed.named_modules())
    with torch.no_grad():
        for name, tensor in twin.state_dict().items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module.endswith("_proj"):
                tensor.copy_(modules[module](torch.eye(tensor.shape[1])).T)
            else:
                tensor.copy_(packed.state_dict()[name])
    return twin


def test_gradients_are_those_of_the_unpacked_base(method, tmp_path, tokens):
    build_model(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(
        tmp_path / "base"
    )
    stored = store(method, tmp_path / "base", tmp_path / "stored")
    base = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    ids = tokens(2, 9)
    base(ids)  # compressed-tensors unpacks itself at the first forward
    labels = ids.masked_fill(torch.arange(9) < 5, -100)
    found = []
    for model in (base, unpacked(base)):
        adapted = build_adapter(model, rank=4)
        loss = adapted(input_ids=ids, labels=labels).loss
        loss.backward()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.any() for p in trained)
        found.append([loss, *(p.grad for p in trained)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_it_is_trained_on_and_comes_back(method, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(quantised.LOG, "warning", lambda text, *_: told.append(text))
    config = build_workspace(tmp_path, mlp=64)
    stored = store(method, tmp_path / "base", tmp_path / "stored")
    for file in (tmp_path / "base").glob("token*"):
        shutil.copy(file, stored)
    out = tmp_path / "adapter"
    model, losses = train(config, base_model=str(stored), output_dir=str(out))
    assert losses[-1] < 0.7 * losses[0]
    up_proj = model.base_model.model.model.layers[0].base_layer.mlp.up_proj
    if method == "awq":
        assert "Awq" in type(up_proj).__name__ and up_proj.qweight.dtype == torch.int32
        assert not told
    else:
        # Of which its user is told: the memory is that of full precision.
        assert up_proj.weight.dtype == torch.float32
        assert any("takes the memory of the full-precision one" in t for t in told)
    base = AutoModelForCausalLM.from_pretrained(
        stored, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.arange(4, 20).view(2, 8)
    # The first forward decides whether gptqmodel computes as in training ever after.
    base.train()(ids)
    again = PeftModel.from_pretrained(base, out).eval()
    with torch.no_grad():
        expected = model.eval()(ids).logits
        torch.testing.assert_close(again(ids).logits, expected)
        with again.disable_adapter():
            assert not torch.allclose(again(ids).logits, expected, atol=1e-2)


def test_an_evaluation_before_training_cuts_no_gradients(tmp_path, tokens):
    """As gptqmodel's kernel for CPUs does by itself."""
    pytest.importorskip("gptqmodel")
    build_model(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(
        tmp_path / "base"
    )
    stored = store("awq", tmp_path / "base", tmp_path / "stored")
    ids = tokens(2, 9)
    labels = ids.masked_fill(torch.arange(9) < 5, -100)
    found = []
    for evaluated in (False, True):
        base = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
        quantised.prepare_base(DictDefault(), base.eval(), training=True)
        adapted = build_adapter(base, rank=4)
        if evaluated:
            with torch.no_grad():
                adapted(input_ids=ids)
        adapted.train()(input_ids=ids, labels=labels).loss.backward()
        found.append([p.grad for p in adapted.parameters() if p.requires_grad])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


class Kernel(torch.nn.Module):
    in_features = 4

    def __init__(self, cut: bool):
        super().__init__()
        self.cut = cut
        self.register_buffer("qweight", torch.zeros(4, 1, dtype=torch.int32))

    def forward(self, inputs):
        return inputs.detach() if self.cut else inputs * 1


def test_a_kernel_that_hands_no_gradients_down_is_refused():
    model = build_model()
    model.quantization_method = "awq"
    model.model.layers[1].mlp.up_proj = Kernel(cut=False)
    quantised.prepare_base(DictDefault(), model, training=True)
    model.model.layers[2].mlp.up_proj = Kernel(cut=True)
    quantised.prepare_base(DictDefault(), model, training=False)
    with pytest.raises(ValueError, match="layers.2.mlp.up_proj of the base is gptq"):
        quantised.prepare_base(DictDefault(), model, training=True)
