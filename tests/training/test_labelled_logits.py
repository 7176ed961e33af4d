"""The logits of labelled tokens alone: the same loss and gradients by fewer."""

import inspect
import pickle

import pytest
import torch
import transformers
from conftest import build_adapter, build_model
from peft import get_peft_model
from transformers import BatchEncoding, DataCollatorForSeq2Seq
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from axolotl_reft import LabelledLogits, LoreftConfig, PromptCounter
from axolotl_reft.training.collators import (
    _hands_arguments_to_loss,
    labelled_logits,
    why_all_logits,
)

PROMPTS = (20, 26, 23)
WIDTH = 30


def batch(tokens, prompts=PROMPTS, width=WIDTH):
    """Rows of a prompt and its answer."""
    ids = tokens(len(prompts), width)
    answers = torch.arange(width) >= torch.tensor(prompts)[:, None]
    return {"input_ids": ids, "labels": ids.where(answers, -100)}


def packed(tokens):
    """One row of samples, of which the third has no answer."""
    lengths, prompts = (14, 9, 7, 20), (12, 2, 7, 16)
    place = torch.cat([torch.arange(length) for length in lengths])[None]
    prompt = torch.cat(
        [torch.full((n,), p) for n, p in zip(lengths, prompts, strict=True)]
    )
    ids = tokens(1, sum(lengths))
    labels = ids.where(place >= prompt, -100)
    return {"input_ids": ids, "labels": labels, "position_ids": place}


def step(model, inputs, **settings):
    """The loss, how many tokens have logits, and every gradient."""
    model.zero_grad()
    output = model(**inputs, use_cache=False, **settings)
    output.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return output.loss, output.logits.shape[1], gradients


@pytest.mark.parametrize("kind", [batch, packed])
@pytest.mark.parametrize("settings", [{}, {"num_items_in_batch": 7}])
def test_loss_and_gradients_are_those_of_all_logits(
    tokens, architecture, kind, settings
):
    model = build_adapter(build_model(architecture), positions="f1+l2")
    inputs = kind(tokens)
    loss, count, gradients = step(model, inputs, **settings)
    fewer = LabelledLogits.of(model, dict)(inputs)
    got, kept, numbers = step(model, fewer, **settings)
    # Of the rows, every column from the shortest prompt's last token on; of the packed
    # row 2 + 7 + 4 tokens, each by the one before.
    assert (count, kept) == {batch: (WIDTH, 16), packed: (50, 16)}[kind]
    torch.testing.assert_close(got, loss)
    for one, other in zip(numbers, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_whoever_has_a_label_after_it_is_kept_and_no_more_than_needed(tokens):
    some = batch(tokens)
    added = labelled_logits(some)
    assert list(added) == ["logits_to_keep", "shift_labels"]
    kept, shifted = added.values()
    # Eleven columns are needed, the last predicts nothing; five more are of prompts.
    needed = set(range(19, 29))
    assert needed < set(kept.tolist()) and len(kept) == 16
    assert kept.tolist() == sorted(set(kept.tolist()))
    following = torch.cat([some["labels"][:, 1:], torch.full((3, 1), -100)], 1)
    assert torch.equal(shifted, following[:, kept])
    assert shifted.is_contiguous()


@pytest.mark.parametrize("answer", [8, 16])
def test_a_multiple_of_eight_is_kept_as_it_is(tokens, answer):
    some = batch(tokens, (WIDTH - answer,))
    assert labelled_logits(some)["logits_to_keep"].tolist() == [
        *range(WIDTH - answer - 1, WIDTH - 1)
    ]


@pytest.mark.parametrize(("answer", "kept"), [(22, 24), (23, None), (30, None)])
def test_all_logits_are_left_where_nearly_all_have_labels(tokens, answer, kept):
    added = labelled_logits(batch(tokens, (WIDTH - answer,)))
    assert (len(added["logits_to_keep"]) if added else None) == kept


def test_other_batches_are_left_as_they_are(tokens):
    some = batch(tokens)
    nothing = torch.full_like(some["labels"], -100)
    for other in (
        {"input_ids": some["input_ids"]},
        {"labels": some["labels"]},
        some | {"labels": torch.tensor([0, 1, 2])},
        some | {"labels": some["labels"][:, 1:]},
        some | {"labels": nothing},
        some | {"input_ids": some["input_ids"].tolist()},
        some | {"logits_to_keep": 1},
        some | {"shift_labels": some["labels"]},
        {key: value[0] for key, value in some.items()},
    ):
        assert labelled_logits(other) == {}


def test_the_collator_goes_to_other_processes_and_stands_beside_the_counter(tokens):
    model = build_adapter(build_model())
    some = batch(tokens)
    collate = LabelledLogits.of(model, PromptCounter.of(model, BatchEncoding))
    got = pickle.loads(pickle.dumps(collate))(some)
    assert isinstance(got, BatchEncoding)
    assert [*got] == [*some, "loreft_positions", "logits_to_keep", "shift_labels"]


def test_padded_features_of_a_tokenizers_collator(tokens):
    """With a mask, and padding on the left."""
    from workspace import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    rows = [
        {
            "input_ids": ids[:n].tolist(),
            "labels": [-100] * (n - 4) + ids[n - 4 : n].tolist(),
        }
        for n, ids in zip((30, 22), tokens(2, 30), strict=True)
    ]
    model = build_adapter(build_model()).train()
    collate = DataCollatorForSeq2Seq(tokenizer)
    loss, _, gradients = step(model, collate(rows))
    got, kept, numbers = step(model, LabelledLogits.of(model, collate)(rows))
    assert kept == 8
    torch.testing.assert_close(got, loss)
    torch.testing.assert_close(numbers, gradients, atol=1e-5, rtol=1e-4)


def bart():
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2
    )
    return transformers.BartForCausalLM(config)


def patched():
    """As Liger's and Cut Cross Entropy's are: another function in the class."""

    class LlamaPatched(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    return LlamaPatched(build_model().config)


def other_loss():
    model = build_model()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    return model


def spread():
    model = build_model()
    model.hf_device_map = {"model": 0, "lm_head": 1}
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (bart, "BartForCausalLM does not compute its loss from the logits that it"),
        (patched, "LlamaPatched's forward is not transformers' own"),
        (other_loss, "LlamaForCausalLM's loss does not take labels that are shifted"),
        (spread, "LlamaForCausalLM is spread over several devices"),
    ],
)
def test_a_model_that_needs_all_logits_is_refused_and_told_why(build, reason):
    base = build()
    assert why_all_logits(base).startswith(reason)
    model = get_peft_model(base, LoreftConfig(task_type="CAUSAL_LM", rank=2))
    with pytest.raises(ValueError, match=f"LabelledLogits: {reason}.*so all logits"):
        LabelledLogits.of(model, dict)


class Forwards:
    """What a forward can do with what it is given; none of them is called."""

    def able(self, labels, logits_to_keep=0, **further):
        return self.loss_function(self.logits, labels, **further)

    def keeps_all(self, labels, **further):
        return self.loss_function(self.logits, labels, **further)

    def takes_no_more(self, labels, logits_to_keep=0):
        return self.loss_function(self.logits, labels, **self.settings)

    def hands_on_others(self, labels, logits_to_keep=0, **further):
        others = {"width": further.pop("width")}
        return self.loss_function(self.logits, labels, **others)

    def hands_on_as_one(self, labels, logits_to_keep=0, **further):
        return self.loss_function(self.logits, labels, settings=further)

    def hands_on_to_another(self, labels, logits_to_keep=0, **further):
        return self.loss_function(self.model(labels, **further), labels)


def test_what_is_read_in_a_source():
    found = {
        name: _hands_arguments_to_loss(forward)
        for name, forward in vars(Forwards).items()
        if callable(forward)
    }
    assert [name for name, able in found.items() if able] == ["able"]
    assert len(found) == 6


def test_a_model_whose_source_cannot_be_read_computes_all_logits(monkeypatch):
    def unreadable(function):
        raise OSError("could not get source code")

    model = build_model()
    assert why_all_logits(model) is None
    model.hf_device_map = {"": 0}
    assert why_all_logits(model) is None
    monkeypatch.setattr(inspect, "getsource", unreadable)
    assert why_all_logits(model) is not None


@pytest.mark.slow
def test_what_is_read_in_a_models_source_holds_for_all_of_transformers_models():
    """Those that hand their arguments to the loss index by what is to be kept."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    names = {
        n for names in found for n in ([names] if isinstance(names, str) else names)
    }
    forwards = {name: getattr(transformers, name).forward for name in names}
    able = {
        name: inspect.getsource(inspect.unwrap(forward))
        for name, forward in forwards.items()
        if _hands_arguments_to_loss(inspect.unwrap(forward))
    }
    assert len(able) > 100
    for name, source in able.items():
        # As one function of theirs from transformers 5.24 on.
        if "slice_logits_to_keep(" not in source:
            assert "else logits_to_keep" in source, name
            assert "hidden_states[:, slice_indices, :]" in source, name


def test_a_compiled_training_computes_the_same(tokens):
    model = build_adapter(build_model()).train()
    collate = LabelledLogits.of(model, PromptCounter.of(model, dict))
    batches = [batch(tokens, (n, n + 5), width=60) for n in (40, 30, 15)]
    expected = [step(model, one) for one in batches]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    for one, (loss, _, gradients) in zip(map(collate, batches), expected, strict=True):
        got, _, numbers = step(model, one)
        torch.testing.assert_close(got, loss)
        torch.testing.assert_close(numbers, gradients, atol=1e-5, rtol=1e-4)
    # 24, 32, and 48 are kept: any number, from the second on.
    assert counter.frame_count == 2
    torch._dynamo.reset()
