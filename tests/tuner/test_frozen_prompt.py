"""Forwards in two parts through training, evaluation and what changes in between."""

import pytest
import torch
from conftest import build_adapter, build_model, move_parameters
from frozen_prompts import (
    TOLERANCE,
    assert_same_in_two_parts,
    difference,
    packed,
    ragged,
    results,
    two_parts,
)
from peft import PeftModel

from axolotl_reft import LoreftConfig

RAGGED = ragged([20, 17, 9, 13], [14, 10, 4, 12])
REENTRANT, NOT = {"use_reentrant": True}, {"use_reentrant": False}


def trained(architecture="llama", adapter=None, **overrides):
    base = build_model(architecture, **overrides)
    return build_adapter(base, **{"positions": "l3"} | (adapter or {})).train()


@pytest.fixture(scope="module")
def shared_model():
    return trained()


@pytest.fixture
def llama(shared_model):
    """A model that a test leaves as it was."""
    before = {n: p.detach().clone() for n, p in shared_model.named_parameters()}
    yield shared_model.train()
    with torch.no_grad():
        for name, parameter in shared_model.named_parameters():
            parameter.copy_(before[name])


# --- what is edited ----------------------------------------------------------------


def test_several_adapters_are_split_at_the_first_edit_of_all():
    model = trained()
    for name, positions in {"longer": "l5", "shorter": "l1"}.items():
        config = LoreftConfig(positions=positions, task_type="CAUSAL_LM")
        model.add_adapter(name, config)
    move_parameters(model, 0.2)
    model.base_model.set_adapter(["default", "longer", "shorter"])
    model.train()
    assert_same_in_two_parts(model, RAGGED)
    with two_parts(model) as seen:
        results(model, ragged([20], [14]))
        assert [tokens for tokens, _ in seen.numbers] == [9, 11]


def test_an_adapter_that_is_not_active_counts_for_nothing(monkeypatch):
    always = "axolotl_reft.tuner.frozen_prompt.saves_time"
    monkeypatch.setattr(always, lambda *args: True)
    model = trained()
    config = LoreftConfig(positions="f2+l5", task_type="CAUSAL_LM")
    model.add_adapter("other", config)
    assert_same_in_two_parts(model, RAGGED, when="auto")
    model.set_adapter("other")
    with two_parts(model, "auto") as seen:
        results(model, RAGGED)
        assert seen.told[0].endswith("positions: f2+l5 edits the prompt's beginning")


def conversation():
    """Two rows of three turns each, and one of one."""
    batch = ragged([22, 18, 9], [6, 5, 4])
    labels = batch["labels"]
    labels[0, 9:13] = labels[0, 16:19] = -100
    labels[1, 7:12] = labels[1, 14:16] = -100
    return batch


MARKS = {"generation_prompts": [[5, 6]], "end_of_turn": [7]}


def marked_conversation():
    """The same, with the marks of a chat template about the answers."""
    batch = conversation()
    ids, labels = batch["input_ids"], batch["labels"]
    ids[(ids == 5) | (ids == 7)] = 8
    for row in range(len(ids)):
        columns = (labels[row] != -100).nonzero().flatten().tolist()
        for column in columns:
            if column - 1 not in columns:
                ids[row, column - 2 : column] = torch.tensor([5, 6])
            if column + 1 not in columns:
                ids[row, column] = 7
    labels[labels != -100] = ids[labels != -100]
    return batch


@pytest.mark.parametrize("turns", ["every", "first"])
@pytest.mark.parametrize("marks", [None, MARKS])
def test_conversations_are_split_at_their_first_turn(turns, marks):
    model = trained(adapter={"turns": turns, "turn_markers": marks})
    batch = marked_conversation() if marks else conversation()
    assert_same_in_two_parts(model, batch)
    with two_parts(model) as seen:
        results(model, {name: t[:1] for name, t in batch.items()})
        assert [tokens for tokens, _ in seen.numbers] == [3, 19]


def test_short_prompts_and_samples_without_edits(llama):
    """A side takes half of a prompt at most: of one token nothing is edited."""
    lengths, prompts = [20, 8, 7, 6, 5], [14, 3, 2, 1, 0]
    samples = list(zip(lengths, prompts, strict=True))
    assert_same_in_two_parts(llama, ragged(lengths, prompts))
    assert_same_in_two_parts(llama, packed(samples), packed(samples[::-1]))
    assert_same_in_two_parts(llama, ragged(lengths[:4], prompts[:4], left=True))


def test_where_padding_predicts_a_trained_token_its_loss_counts(llama):
    """The first token of a row that has no prompt, and answers in padding."""
    no_prompt, beyond = ragged([9, 6], [6, 0], left=True), ragged([9, 6], [6, 2])
    beyond["labels"][1, 8] = 3
    for batch in (no_prompt, beyond):
        expected = results(llama, batch)
        with two_parts(llama) as seen:
            assert difference(results(llama, batch), expected) < TOLERANCE
            assert [parts for _, parts in seen.numbers] == [False]


def test_a_batch_of_one_column_and_a_batch_of_samples_alike(llama):
    batch = ragged([20], [14])
    alike = {name: tensor.repeat(4, 1) for name, tensor in batch.items()}
    assert_same_in_two_parts(llama, alike)
    with two_parts(llama) as seen:
        results(llama, alike)
        assert [tokens for tokens, _ in seen.numbers] == [11, 4 * 9]


def test_dropout_of_the_adapter_meets_the_same_numbers():
    model = trained(adapter={"dropout": 0.3})
    assert_same_in_two_parts(model, RAGGED, ragged([20, 17], [14, 10], left=True))


# --- how it is computed ------------------------------------------------------------


def loose(model, batch, context=None):
    """The difference of two parts from one, and of one from float32, in bf16."""
    plain = results(model, batch)
    with two_parts(model) as seen:
        got = [results(model, batch) for _ in range(2)]
        assert all(parts for _, parts in seen.numbers)
        assert len(seen.numbers) > 2
    return plain, got


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_in_bfloat16_within_the_spread_of_the_base(how):
    model = trained()
    exact = results(model, RAGGED)
    if how == "weights":
        model.get_base_model().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        plain, got = loose(model, RAGGED)
    spread = difference(plain, exact)
    assert 1e-4 < spread < 0.2
    assert max(difference(each, plain) for each in got) < 2 * spread
    assert max(difference(each, exact) for each in got) < 2 * spread


def test_gradients_accumulate_over_batches(llama):
    batches = [RAGGED, ragged([12, 20], [9, 16], seed=1)]

    def accumulated():
        llama.zero_grad()
        for batch in batches:
            llama(**batch).loss.backward()
        return {
            n: p.grad.clone() for n, p in llama.named_parameters() if p.requires_grad
        }

    expected = accumulated()
    with two_parts(llama):
        for _ in range(2):
            for name, gradient in accumulated().items():
                largest = expected[name].abs().max()
                assert (gradient - expected[name]).abs().max() < TOLERANCE * largest


def test_two_forwards_before_their_backwards_under_checkpointing():
    """As in DPO: the first is replayed when the second has been."""
    model = trained(adapter={"component": "mlp_output"})
    batches = [RAGGED, ragged([12, 20], [9, 16], seed=1)]

    def both():
        model.zero_grad()
        losses = [model(**batch).loss for batch in batches]
        sum(losses).backward()
        return {
            n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
        }

    expected = both()
    for settings in (REENTRANT, NOT):
        model.gradient_checkpointing_enable(settings)
        with two_parts(model):
            for name, gradient in [*both().items(), *both().items()]:
                largest = expected[name].abs().max()
                assert (gradient - expected[name]).abs().max() < TOLERANCE * largest


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_steps_is_the_same(llama, mode):
    def evaluated():
        llama.eval()
        with mode():
            output = llama(**RAGGED, use_cache=False)
        llama.train()
        return output.loss.clone(), output.logits[RAGGED["attention_mask"] != 0].clone()

    expected, step = evaluated(), results(llama, RAGGED)
    with two_parts(llama) as seen:
        for _ in range(2):
            for got, right in zip(evaluated(), expected, strict=True):
                assert (got - right).abs().max() < TOLERANCE * right.abs().max()
            assert difference(results(llama, RAGGED), step) < TOLERANCE
        assert all(parts for _, parts in seen.numbers)


def test_a_reference_forward_is_the_bare_base(llama):
    def reference():
        with llama.disable_adapter(), torch.no_grad():
            return llama(**RAGGED, use_cache=False).logits[
                RAGGED["attention_mask"] != 0
            ]

    expected = reference()
    with two_parts(llama) as seen:
        for _ in range(2):
            assert (reference() - expected).abs().max() < TOLERANCE * 10
        assert [parts for _, parts in seen.numbers[-2:]] == [True, True]


def test_hidden_states_of_the_backbone_are_the_plain_ones(llama):
    """Whoever reads them: padding alone is nobody's, and zero."""
    backbone = llama.get_base_model().model
    real = RAGGED["attention_mask"] != 0
    seen = []
    handle = backbone.register_forward_hook(lambda m, a, o: seen.append(o[0].detach()))
    results(llama, RAGGED)
    with two_parts(llama):
        results(llama, RAGGED)
    handle.remove()
    plain, got = seen
    assert got.shape == plain.shape
    assert (got[real] - plain[real]).abs().max() < TOLERANCE * plain.abs().max()
    assert not got[~real].any()


# --- training ----------------------------------------------------------------------


def batch_of(step):
    """Of five batches in turn, of which two share the beginnings of their prompts."""
    batch = ragged([20, 17, 9], [14, 10, 4], seed=step % 4, left=step % 2 == 0)
    if step % 5 == 3:
        batch["input_ids"][:, :3] = 9
    return batch


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model(**batch_of(step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def new_optimizer(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.1)


def test_a_hundred_steps_have_the_same_losses():
    plain, parts = trained(), trained()
    expected = train(plain, new_optimizer(plain), range(100))
    with two_parts(parts) as seen:
        losses = train(parts, new_optimizer(parts), range(100))
        assert all(in_parts for _, in_parts in seen.numbers)
        assert len(seen.numbers) < 120, "nearly all is kept"
    assert expected[-1] < 0.9 * expected[0]
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[:20] == pytest.approx(expected[:20], rel=1e-5)


def test_a_resumed_run_goes_on_as_it_would_have(tmp_path, one_thread):
    """To the last bit: what is kept is what is computed."""
    model = trained()
    model.save_pretrained(tmp_path)
    with two_parts(model):
        expected = train(model, new_optimizer(model), range(12))
    losses, state = [], None
    for start in (0, 6):
        base = build_model()
        model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
        optimizer = new_optimizer(model)
        if state:
            optimizer.load_state_dict(state)
        with two_parts(model):
            losses += train(model, optimizer, range(start, start + 6))
        model.save_pretrained(tmp_path)
        state = optimizer.state_dict()
    assert losses == pytest.approx(expected, rel=1e-6)
