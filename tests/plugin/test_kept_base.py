"""A base that several trainings share: what a copy has of its own, and when not."""

import torch
from conftest import build_adapter, build_model
from torch import nn

from axolotl_reft.plugin.kept_base import (
    KeptBase,
    can_be_shared,
    checksums,
    copy_sharing_weights,
)


def counting(loads, **settings):
    return lambda: loads.append(1) or build_model(**settings)


def test_copies_share_the_weights_and_nothing_else():
    base = build_model(tie_word_embeddings=True)
    before, names = checksums(base), dict(base.named_parameters())
    copy = copy_sharing_weights(base)
    for name, parameter in copy.named_parameters():
        assert parameter is not names[name]
        assert parameter.data_ptr() == names[name].data_ptr()
    assert copy.lm_head.weight is copy.get_input_embeddings().weight
    copy.requires_grad_(False)
    copy.config.use_cache = False
    copy.model.layers[0].register_forward_hook(lambda *_: None)
    copy.to(torch.float64)
    next(copy.buffers()).add_(1)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in names.values())
    assert base.config.use_cache
    assert can_be_shared(base) and checksums(base) == before


def test_an_adapter_on_a_copy_leaves_the_base_as_it_was(batch):
    base = build_model()
    with torch.no_grad():
        expected = base(**batch).logits
    # Outputs are captured by hooks from the first forward on.
    base, loads = build_model(), []
    kept = KeptBase()
    model = build_adapter(kept.load("base", lambda: loads.append(1) or base))
    model.train()(**batch).loss.backward()
    again = kept.load("base", lambda: loads.append(1) or base)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, expected)
        assert torch.equal(model.unload()(**batch).logits, expected)
    assert len(loads) == 1


def test_a_base_whose_weights_were_changed_is_loaded_again():
    kept, loads = KeptBase(), []
    first = kept.load("base", counting(loads))
    with torch.no_grad():
        first.lm_head.weight[3, 5] += 1
    second = kept.load("base", counting(loads))
    assert len(loads) == 2
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    kept.load("base", counting(loads))
    assert len(loads) == 2


def test_another_base_is_loaded():
    kept, loads = KeptBase(), []
    for source in ("base", "base", "other", "base"):
        kept.load(source, counting(loads))
    assert len(loads) == 3


def test_models_that_a_copy_would_not_be_are_not_shared():
    class Packed(nn.Parameter):
        pass

    def packed(model):
        model.lm_head.weight = Packed(model.lm_head.weight.data)

    def hooked(model):
        model.lm_head.register_forward_pre_hook(lambda *_: None)

    def replaced(model):
        model.lm_head.forward = model.lm_head.forward

    def on_meta(model):
        model.lm_head.to("meta")

    for change in (packed, hooked, replaced, on_meta):
        model, kept = build_model(), KeptBase()
        change(model)
        assert not can_be_shared(model)
        load = [model, model].pop
        assert kept.load("base", load) is model and kept.load("base", load) is model
