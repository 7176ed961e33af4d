"""What a forward in parts leaves out, and when it is not looked at."""

import pytest
import torch
from conftest import build_adapter, build_model
from frozen_prompts import TOLERANCE, difference, ragged, results, two_parts
from torch import nn

from axolotl_reft.training.collators import labelled_logits
from axolotl_reft.tuner.two_parts import HostBatch

BATCH = ragged([20, 17, 9], [14, 10, 4])


@pytest.fixture(scope="module")
def model():
    return build_adapter(build_model(), positions="l3").train()


def tokens_of(module):
    """Note the tokens that a module computes from now on."""
    seen = []
    hook = lambda m, args, output: seen.append(args[0].shape[:-1].numel())  # noqa: E731
    return seen, module.register_forward_hook(hook)


def _without_logits(model, batch):
    """The loss and the gradients."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *(p.grad.clone() for p in trained)]


def test_where_labels_alone_have_logits_the_last_layer_skips_the_preambles(model):
    batch = ragged([40, 34, 20], [32, 30, 16])
    labelled = batch | labelled_logits(batch)
    assert "shift_labels" in labelled
    whole = results(model, batch)
    expected = _without_logits(model, labelled)
    layers = model.get_base_model().model.layers
    (first, _), (last, _) = (
        tokens_of(layers[n].base_layer.mlp) for n in (0, len(layers) - 1)
    )
    with two_parts(model) as seen:
        torch.testing.assert_close(
            _without_logits(model, labelled), expected, atol=1e-6, rtol=1e-4
        )
        behind = seen.numbers[-1][0]
        assert last == [behind]
        assert len(first) > 1
        # Others see hidden states of all tokens.
        assert difference(results(model, batch), whole) < TOLERANCE
        assert len(last) == len(first) - 1


def test_an_answer_ahead_of_the_first_edited_token_is_in_the_loss(model):
    """Behind a prompt of one token, of which nothing is edited."""
    batch = ragged([40, 34], [30, 24])
    batch["labels"][0, 1:5] = batch["input_ids"][0, 1:5]
    labelled = batch | labelled_logits(batch)
    assert "shift_labels" in labelled
    expected = _without_logits(model, labelled)
    with two_parts(model) as seen:
        torch.testing.assert_close(
            _without_logits(model, labelled), expected, atol=1e-6, rtol=1e-4
        )
        assert seen.numbers[0][1]


def test_neftune_s_noise_is_of_the_whole(model):
    with two_parts(model, "auto") as seen:
        embeddings = model.get_input_embeddings()
        embeddings.neftune_noise_alpha = 5
        try:
            results(model, BATCH)
        finally:
            del embeddings.neftune_noise_alpha
        assert "NEFTune's noise" in seen.told[0]
        assert not seen.numbers[0][1]


def test_products_that_depend_on_the_whole_batch():
    class Linear8bitLt(nn.Linear):
        """As bitsandbytes' is called."""

    base = build_model()
    base.model.layers[0].mlp.down_proj.__class__ = Linear8bitLt
    model = build_adapter(base, positions="l3")
    with pytest.raises(ValueError, match="Linear8bitLt depends on the whole batch"):
        with two_parts(model):
            pass


def test_forwards_as_a_whole_are_looked_at_one_in_eight(model, monkeypatch):
    """Until one is in parts, or the mode is another."""
    read, looks = HostBatch.read.__func__, []

    def counted(cls, *args):
        looks.append(args)
        return read(cls, *args)

    monkeypatch.setattr(HostBatch, "read", classmethod(counted))
    with two_parts(model, "auto") as seen:
        for _ in range(24):
            model(**BATCH)
        assert len(looks) == 11  # the first nine, and two more
        assert not any(parts for _, parts in seen.numbers)
        looks.clear()
        with torch.no_grad():
            model(**BATCH, use_cache=False)
        assert len(looks) == 1
