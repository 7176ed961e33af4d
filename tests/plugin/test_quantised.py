"""Bases in 4 and 8 bits: what is asked for is what is trained on, or it is refused."""

import pytest
import torch
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import build_adapter, build_model
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from training import train
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from workspace import build_workspace
from yaml_config import validated

from axolotl_reft import LoreftConfig
from axolotl_reft.plugin import quantised

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return build_workspace(tmp_path_factory.mktemp("quantised"), mlp=64)


def trained_base(model):
    return [layer.base_layer for layer in model.base_model.model.model.layers]


def linears(layers):
    return [
        module
        for layer in layers
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    ]


def fell(losses):
    return losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_the_losses_of_a_4_bit_base_are_the_same_in_two_parts(config, tmp_path):
    runs = []
    for frozen_prompt in (False, True):
        block = {"positions": "l1", "rank": 4, "frozen_prompt": frozen_prompt}
        output = str(tmp_path / str(frozen_prompt))
        _, losses = train(config, 4, load_in_4bit=True, loreft=block, output_dir=output)
        runs.append(losses)
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


@pytest.mark.slow
def test_a_4_bit_base_is_one_and_is_trained_on_and_comes_back(config, tmp_path):
    model, losses = train(config, load_in_4bit=True, output_dir=str(tmp_path))
    found = linears(trained_base(model))
    assert len(found) == 3 * 7 and all(type(m) is Linear4bit for m in found)
    for module in found:
        state = module.weight.quant_state
        assert state.quant_type == "nf4" and state.nested
        assert module.weight.dtype == torch.uint8
        assert module.weight.numel() * 2 == module.in_features * module.out_features
        assert module.compute_dtype == torch.float32
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    assert fell(losses)
    base = AutoModelForCausalLM.from_pretrained(
        config.parent / "base",
        quantization_config=BitsAndBytesConfig(**NF4),
        attn_implementation="eager",
    )
    # Trainable, so that bitsandbytes computes by the same kernel.
    reloaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    ids = torch.arange(4, 20).view(2, 8)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        torch.testing.assert_close(reloaded(ids).logits, expected)
        with reloaded.disable_adapter():
            assert not torch.allclose(reloaded(ids).logits, expected, atol=1e-2)


@pytest.mark.slow
def test_an_8_bit_base_is_one_and_is_trained_on(config, tmp_path):
    model, losses = train(config, load_in_8bit=True, output_dir=str(tmp_path))
    found = linears(trained_base(model))
    assert len(found) == 3 * 7 and all(type(m) is Linear8bitLt for m in found)
    assert all(m.weight.dtype == torch.int8 for m in found)
    assert fell(losses)


@pytest.mark.slow
def test_settings_of_bitsandbytes_are_followed(config, tmp_path):
    model, losses = train(
        config,
        load_in_4bit=True,
        gradient_checkpointing=True,
        bnb_config_kwargs={
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_skip_modules": ["lm_head", "down_proj"],
        },
        output_dir=str(tmp_path),
    )
    layer = trained_base(model)[0]
    state = layer.mlp.up_proj.weight.quant_state
    assert state.quant_type == "fp4" and not state.nested
    assert layer.mlp.up_proj.compute_dtype == torch.bfloat16
    assert type(layer.mlp.down_proj) is torch.nn.Linear
    assert fell(losses)


def test_a_base_that_was_not_quantised_as_asked_stops_training(config, tmp_path):
    with pytest.raises(ValueError, match="load_in_4bit: true, but no linear layer of "):
        train(config, load_in_4bit=True, reinit_weights=True, output_dir=str(tmp_path))


def test_experts_that_are_left_out_are_told_of(monkeypatch, tmp_path):
    build_model("mixtral", hidden_size=64, intermediate_size=64).save_pretrained(
        tmp_path
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**NF4)
    )
    told = []
    monkeypatch.setattr(quantised.LOG, "warning", lambda *message: told.append(message))
    quantised.prepare_base(DictDefault(load_in_4bit=True), model, training=True)
    (message, key, share), *_ = told
    assert "weights of the base's layers are not quantised" in message
    assert key == "load_in_4bit" and 50 < share < 100


def test_what_was_validated_is_validated_to_the_same():
    extra = {"bnb_4bit_quant_type": "fp4"}
    once = validated(load_in_4bit=True, bnb_config_kwargs=extra)
    config = once.overrides_of_model_kwargs.quantization_config.to_dict()
    assert config == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_type": "fp4",
    }
    again = validate_config(DictDefault(once.to_dict()))
    assert again.overrides_of_model_kwargs == once.overrides_of_model_kwargs
    # And once more after the dtype has become known.
    again.torch_dtype = torch.bfloat16
    quantised.fill_config(again)
    completed = again.overrides_of_model_kwargs.quantization_config.to_dict()
    assert completed == config | {"bnb_4bit_compute_dtype": "bfloat16"}
    del again["torch_dtype"]
    third = validate_config(again).overrides_of_model_kwargs
    assert third.quantization_config.to_dict() == completed


def test_other_keyword_arguments_of_the_model_are_kept():
    kwargs = validated(
        load_in_8bit=True, model_kwargs={"use_safetensors": True}
    ).overrides_of_model_kwargs
    assert kwargs.use_safetensors and kwargs.quantization_config.load_in_8bit


def test_a_compute_dtype_of_the_config_is_kept():
    cfg = validated(
        load_in_4bit=True, bnb_config_kwargs={"bnb_4bit_compute_dtype": "float16"}
    )
    cfg.torch_dtype = torch.bfloat16
    quantised.fill_config(cfg)
    config = cfg.overrides_of_model_kwargs.quantization_config
    assert config.bnb_4bit_compute_dtype == "float16"


REFUSED = [
    ({"load_in_4bit": True, "load_in_8bit": True},
     "load_in_8bit: true with load_in_4bit: true: a base has one bit width"),
    ({"load_in_4bit": True, "fsdp_config": {"reshard_after_forward": True},
      "fsdp_version": 2}, "fsdp_config: .* with load_in_4bit: true: axolotl shards"),
    ({"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}},
     "with no load_in_4bit or load_in_8bit: it would do nothing"),
    ({"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_quant_typ": "fp4"}},
     "unknown key 'bnb_4bit_quant_typ'. Did you mean 'bnb_4bit_quant_type'"),
    ({"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf5"}},
     "'bnb_4bit_quant_type': 'nf5'.: bnb_4bit_quant_type is nf4 or fp4"),
    ({"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_compute_dtype": "bf"}},
     "bnb_config_kwargs: .*'bnb_4bit_compute_dtype': 'bf'.: .*attribute 'bf'"),
    ({"load_in_4bit": True, "bnb_config_kwargs": {"load_in_8bit": True}},
     "bnb_config_kwargs: .*unknown key 'load_in_8bit'"),
    ({"load_in_4bit": True, "model_kwargs": {"quantization_config": {"load_in_8bit": 1}}
      }, "both say how to quantise the base"),
    ({"bnb_4bit_quant_type": "nf4"},
     "bnb_4bit_quant_type: nf4 with .* not a key at the top"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_mistake_in_the_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        validated(**changes)


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            {},
            "quantised with gptq: transformers needs optimum 1.24.0 or newer",
        ),
        (
            {"quant_method": "awq", "bits": 4},
            {},
            "quantised with awq: .* not installed; pip install 'gptqmodel<7.7'",
        ),
        (
            {"quant_method": "compressed-tensors"},
            {},
            "compressed_tensors is not installed; pip install",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            {"fsdp_config": {"reshard_after_forward": True}},
            "quantised with bitsandbytes: FSDP cannot shard .* remove fsdp_config",
        ),
        (
            {"quant_method": "fp8"},
            {},
            "quantised with fp8: transformers cannot train through it",
        ),
        (
            {"quant_method": "awq"},
            {"load_in_4bit": True},
            "quantised with awq: load_in_4bit: true cannot quantise it again",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            {"load_in_4bit": True},
            "quantised with bitsandbytes: load_in_4bit: true cannot quantise it again",
        ),
        (
            None,
            {"model_quantization_config": "FineGrainedFP8Config"},
            "quantised with FineGrainedFP8Config: transformers cannot",
        ),
    ],
)
def test_a_base_that_is_quantised_otherwise(monkeypatch, base, settings, message):
    monkeypatch.setattr(quantised, "find_spec", lambda package: None)
    model_config = AutoConfig.for_model("llama")
    if base:
        model_config.quantization_config = base
    with pytest.raises(ValueError, match=message):
        quantised.check_stored(settings, model_config, training=True)


@pytest.mark.slow
def test_a_base_stored_in_4_bits_needs_no_setting(config, tmp_path):
    stored = tmp_path / "stored"
    AutoModelForCausalLM.from_pretrained(
        config.parent / "base", quantization_config=BitsAndBytesConfig(**NF4)
    ).save_pretrained(stored)
    model, losses = train(
        config,
        base_model=str(stored),
        tokenizer_config=str(config.parent / "base"),
        output_dir=str(tmp_path / "out"),
    )
    assert all(type(m) is Linear4bit for m in linears(trained_base(model)))
    assert fell(losses)


def test_an_evaluation_before_training_cuts_no_gradients(tmp_path, tokens):
    """As bitsandbytes' kernel does, which it takes on CPUs with bfloat16."""
    build_model(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(
        tmp_path
    )
    ids = tokens(2, 9)
    labels = ids.masked_fill(torch.arange(9) < 5, -100)

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(**NF4)
        )

    found = []
    for evaluated in (False, True):
        model = build_adapter(load())
        layers = linears(trained_base(model))
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
        if evaluated:
            with torch.no_grad():
                model.eval()(ids)
        model.train()(input_ids=ids, labels=labels).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)
    base = load()
    packed = base.model.layers[0].mlp.up_proj
    packed.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj of the base was packed"):
        build_adapter(base)
    # For answering that kernel is as good as another.
    get_peft_model(base, LoreftConfig(inference_mode=True))


def test_in_plain_python(tmp_path, tokens):
    """A base with BitsAndBytesConfig, without axolotl."""
    build_model(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(
        tmp_path / "base"
    )

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=BitsAndBytesConfig(**NF4)
        )

    ids = tokens(2, 9)
    labels = ids.masked_fill(torch.arange(9) < 5, -100)
    base = prepare_model_for_kbit_training(load())
    model = get_peft_model(base, LoreftConfig(task_type="CAUSAL_LM", positions="f2+l2"))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.02
    )
    losses = []
    for _ in range(8):
        loss = model.train()(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert fell(losses)
    model.save_pretrained(tmp_path / "adapter")
    # Trainable, so that bitsandbytes computes by the same kernel.
    adapter = tmp_path / "adapter"
    again = PeftModel.from_pretrained(load(), adapter, is_trainable=True).eval()
    with torch.no_grad():
        # Embeddings and norms are the base's own here, in float32 already.
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
        answer = again.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    assert answer.shape == (2, 11)
