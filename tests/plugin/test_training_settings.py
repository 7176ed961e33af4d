"""Settings of axolotl's training beside the adapter, each in a short run."""

import warnings

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from training import train
from transformers import AutoModelForCausalLM
from transformers.loss import loss_utils
from workspace import build_workspace

from axolotl_reft import LoreftModel

KEEP = "logits_to_keep"
LORA = {"layers": "all", "rank": 4, "lora": {"r": 4, "target_modules": ["q_proj"]}}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return build_workspace(tmp_path_factory.mktemp("settings"))


def adapter_numbers(model):
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.slow
def test_lora_beside_loreft_is_trained_resumed_and_loaded_with_it(config, tmp_path):
    def run(name, **changes):
        return train(config, 8, loreft=LORA, output_dir=str(tmp_path / name), **changes)

    whole, losses = run("out", save_steps=4)
    numbers = adapter_numbers(whole)
    assert any(name.endswith("_B") and n.abs().sum() > 0 for name, n in numbers.items())
    resumed, later = run(
        "again", resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4")
    )
    # A resumed run remembers the losses before it.
    assert later == losses and len(losses) == 8
    for name, number in adapter_numbers(resumed).items():
        assert torch.equal(number, numbers[name]), name
    base = AutoModelForCausalLM.from_pretrained(
        config.parent / "base", attn_implementation="eager"
    )
    reloaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    ids = torch.arange(4, 20).view(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, whole.eval()(ids).logits)


@pytest.mark.slow
def test_lora_beside_loreft_on_a_base_in_4_bits(config, tmp_path):
    model, losses = train(
        config, loreft=LORA, load_in_4bit=True, output_dir=str(tmp_path)
    )
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    numbers = adapter_numbers(model)
    assert any(name.endswith("_B") and n.abs().sum() > 0 for name, n in numbers.items())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_chunks_of_the_loss_change_no_loss(config, tmp_path, monkeypatch):
    # What axolotl patches is put back for the tests that follow.
    monkeypatch.setattr(loss_utils, "ForCausalLMLoss", loss_utils.ForCausalLMLoss)
    mapping = loss_utils.LOSS_MAPPING
    monkeypatch.setitem(mapping, "ForCausalLM", mapping["ForCausalLM"])
    _, expected = train(config, 6, output_dir=str(tmp_path / "plain"))
    # Compiled, it would compute the same a minute later.
    with torch._dynamo.config.patch(disable=True):
        model, losses = train(
            config,
            6,
            chunked_cross_entropy=True,
            chunked_cross_entropy_num_chunks=3,
            output_dir=str(tmp_path / "chunks"),
        )
    used = model.get_base_model().loss_function.__name__
    assert used == "for_causal_lm_chunked_loss"
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))


@pytest.mark.slow
@pytest.mark.slow
def test_reentrant_checkpointing_does_not_say_that_gradients_are_none(config, tmp_path):
    """Of frozen layers below the first edit, of which there are none to have."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(
            config,
            2,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
            loreft={"layers": [-1]},
            output_dir=str(tmp_path),
        )
    assert not [one for one in told if "requires_grad=True" in str(one.message)]


def test_samples_in_the_order_of_a_curriculum(config, tmp_path):
    def run(name, **changes):
        output = str(tmp_path / name)
        return train(config, loreft={"rank": 4}, output_dir=output, **changes)[1]

    losses = run("curriculum", curriculum_sampling=True)
    assert losses[-1] < 0.7 * losses[0]
    # Both begin with the bare base; only the first batch can tell them apart.
    assert losses[0] != run("shuffled")[0]


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_logits_of_labelled_tokens_alone_change_no_loss(
    config, tmp_path, monkeypatch, packed
):
    """Of trainings and their evaluations."""
    kept = []
    forward = LoreftModel.forward

    def recorded(self, *args, **batch):
        width = batch["input_ids"].shape[1]
        count = len(batch[KEEP]) if KEEP in batch else width
        output = forward(self, *args, **batch)
        assert output.logits.shape[1] == count
        kept.append((self.training, count < width))
        return output

    monkeypatch.setattr(LoreftModel, "forward", recorded)
    # Packed in this process, and by no pool of others.
    packing = {"sample_packing": True, "sample_packing_sequentially": True}
    settings = {**packing, "micro_batch_size": 2} if packed else {}
    runs = []
    for labelled in (False, True):
        kept.clear()
        model, losses = train(
            config,
            3,
            evaluates=True,
            eval_steps=3,
            dataloader_num_workers=0,
            loreft_labelled_logits=labelled,
            sequence_len=64,
            output_dir=str(tmp_path / str(labelled)),
            **settings,
        )
        runs.append((losses, adapter_numbers(model)))
        # Some batches have too few tokens without labels.
        for training in (True, False):
            assert ((training, True) in kept) is labelled
    (expected, numbers), (losses, got) = runs
    assert len(losses) >= 4
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(got, numbers, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_a_cpu_trains_in_bfloat16(config, tmp_path, monkeypatch):
    # axolotl leaves it set, for all that trains later in this process.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    _, expected = train(config, 12, output_dir=str(tmp_path / "float32"))
    model, losses = train(config, 12, bf16=True, output_dir=str(tmp_path / "bfloat16"))
    assert {p.dtype for p in model.get_base_model().lm_head.parameters()} == {
        torch.bfloat16
    }
    assert all(n.dtype == torch.float32 for n in adapter_numbers(model).values())
    assert losses == pytest.approx(expected, abs=0.1) and losses != expected
