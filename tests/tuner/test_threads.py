"""One model in several threads, as a server has it: each sees its own prompts."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, get_ident

import pytest
import torch
from conftest import build_adapter, build_model

from axolotl_reft import LoreftConfig

SECONDS = 60


@pytest.fixture
def model():
    return build_adapter(build_model(), positions="f2+l3", tied_weights=False)


def forward(model, ids, **settings):
    with torch.no_grad():
        return model(ids, **settings).logits


def labelled(model, ids):
    return forward(model, ids, labels=ids.where(torch.arange(ids.shape[1]) > 6, -100))


def with_gradients(model, ids):
    return model(ids).logits.detach()


def as_the_base(model, ids):
    return forward(model, ids, adapter_names=["__base__"])


def weakened(model, ids):
    return forward(model, ids, adapter_names=[("default", 0.5)])


def generated(model, ids):
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4,
        do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits, 1)


def hidden_states(model, ids):
    with torch.no_grad():
        return torch.stack(model(ids, output_hidden_states=True).hidden_states)


def first_layer(model):
    return model.base_model.model.model.layers[0]


def together(model, *calls):
    """All calls, each in a thread of its own; none enters the first layer before all
    are there."""
    barrier, waited = Barrier(len(calls)), set()

    def wait_once(module, args):
        if get_ident() not in waited:
            waited.add(get_ident())
            barrier.wait(SECONDS)

    handle = first_layer(model).register_forward_pre_hook(wait_once)
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call, model, ids) for call, ids in calls]
        results = [future.result(SECONDS) for future in futures]
    handle.remove()
    assert len(waited) == len(calls)
    return results


WAYS = [
    forward, labelled, with_gradients, as_the_base, weakened, generated, hidden_states
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_threads_compute_what_each_does_alone(model, tokens, way):
    calls = [(way, tokens(1, 9)), (forward, tokens(2, 14, seed=1))]
    alone = [call(model, ids) for call, ids in calls]
    for _ in range(3):
        for got, expected in zip(together(model, *calls), alone, strict=True):
            assert torch.equal(got, expected)


def test_threads_have_heads_of_their_own_by_row(tokens):
    model = build_adapter(build_model(), modules_to_save=["lm_head"])
    torch.manual_seed(1)
    model.add_adapter("other", LoreftConfig(modules_to_save=["lm_head"]))
    for path, parameter in model.named_parameters():
        if ".other." in path:
            parameter.data += torch.randn_like(parameter)

    def by_row(names):
        return lambda model, ids: forward(model, ids, adapter_names=names)

    calls = [
        (by_row(["other"]), tokens(1, 9)),
        (by_row(["default", "__base__", "other"]), tokens(3, 7, seed=1)),
        (forward, tokens(2, 5, seed=2)),
    ]
    alone = [call(model.eval(), ids) for call, ids in calls]
    for got, expected in zip(together(model, *calls), alone, strict=True):
        assert torch.equal(got, expected)


def test_no_thread_answers_by_a_layer_that_another_has_changed(tokens):
    """A layer that is edited within is changed for its replay, where it is trained."""
    model = build_adapter(build_model(), component="mlp_output")
    model.gradient_checkpointing_enable()
    layer, seen = first_layer(model).base_layer, []
    was = layer._gradient_checkpointing_func
    layer.mlp.register_forward_pre_hook(
        lambda *_: seen.append(layer._gradient_checkpointing_func is was)
    )
    forward(model.eval(), tokens(1, 9))
    assert seen == [True]


def test_a_copy_has_nothing_under_way(model, tokens):
    expected, copies = forward(model, tokens(1, 9)), []
    handle = first_layer(model).register_forward_pre_hook(
        lambda *_: copies.append(model_copy())
    )

    def model_copy():
        handle.remove()
        return copy.deepcopy(model)

    forward(model, tokens(1, 9))
    (other,) = copies
    assert other.base_model.model.loreft_hooks.state.thread.context is None
    assert torch.equal(forward(other, tokens(1, 9)), expected)


def test_dataparallel_is_refused(model, tokens):
    """Its copies are made on GPUs; this is what each of them is."""
    replica = model.base_model.model.model._replicate_for_data_parallel()
    with pytest.raises(
        ValueError, match=r"DataParallel, .*accelerate launch.* .CUDA_VISIBLE_DEVICES=0"
    ):
        replica(tokens(1, 9))
