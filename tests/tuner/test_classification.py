"""The paper's GLUE setting: a prefix on an encoder, and a classifier's head."""

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import RobertaConfig, RobertaForSequenceClassification

from axolotl_reft import LoreftConfig

PAD = 1


def build_roberta():
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=24,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        initializer_range=0.2,
    )
    return RobertaForSequenceClassification(config).eval()


def samples(count, seed):
    """Ragged sentences, right-padded; the label is whether token 7 is in them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, 40, (count, 10), generator=generator)
    ids[:, 0] = 0
    labels = torch.arange(count) % 2
    places = torch.randint(1, 6, (count,), generator=generator)
    ids[torch.arange(count), places] = torch.where(
        labels.bool(), 7, ids[torch.arange(count), places]
    )
    lengths = torch.randint(6, 11, (count, 1), generator=generator)
    mask = torch.arange(10) < lengths
    return {"input_ids": ids.where(mask, PAD), "attention_mask": mask.long()}, labels


def build_adapter():
    torch.manual_seed(2)
    config = LoreftConfig(task_type="SEQ_CLS", positions="f3", rank=4)
    return get_peft_model(build_roberta(), config)


@torch.no_grad()
def accuracy(model, inputs, labels):
    return (model.eval()(**inputs).logits.argmax(-1) == labels).float().mean().item()


def test_a_task_is_learned_saved_and_loaded_with_its_head(tmp_path):
    model = build_adapter()
    test, test_labels = samples(200, seed=100)
    assert accuracy(model, test, test_labels) < 0.65
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    model.train()
    for step in range(400):
        inputs, labels = samples(64, seed=step)
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = accuracy(model, test, test_labels)
    assert learned > 0.9
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any("classifier" in key for key in saved)
    assert any(".intv_0." in key for key in saved)
    loaded = PeftModel.from_pretrained(build_roberta(), tmp_path)
    assert accuracy(loaded, test, test_labels) == learned
    with loaded.disable_adapter():
        assert accuracy(loaded, test, test_labels) < learned


@torch.no_grad()
def test_padding_changes_nothing():
    model = build_adapter().eval()
    inputs, _ = samples(4, seed=0)
    batch = model(**inputs).logits
    for row in range(4):
        count = int(inputs["attention_mask"][row].sum())
        alone = model(input_ids=inputs["input_ids"][row : row + 1, :count]).logits[0]
        assert torch.allclose(batch[row], alone, atol=1e-6)


@torch.no_grad()
def test_the_prefix_is_what_is_edited():
    model = build_adapter().eval()
    inputs, labels = samples(2, seed=0)
    seen = []
    layer = model.base_model.model.roberta.encoder.layer[0]
    layer.base_layer.register_forward_hook(lambda m, a, out: seen.append(out))
    layer.register_forward_hook(lambda m, a, out: seen.append(out))
    model(**inputs, labels=labels)
    before, after = (out[0] if isinstance(out, tuple) else out for out in seen)
    changed = (before != after).any(-1)
    assert changed[:, :3].all() and not changed[:, 3:].any()
