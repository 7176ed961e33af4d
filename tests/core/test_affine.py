"""Stacked interventions compute what each of them does."""

import pytest
import torch
from torch.testing import assert_close

from axolotl_reft.core.affine import (
    AffineStack,
    StackCache,
    affine_rows,
    affine_stack,
    other_side,
    projections,
)
from axolotl_reft.core.interventions import INTERVENTION_CLASSES


def build(name="loreft", size=12, rank=3, **settings):
    module = INTERVENTION_CLASSES[name](
        embed_dim=size, low_rank_dimension=rank, **settings
    )
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def step(edit, h_ND, modules, weights_ND):
    """The edited rows, and all gradients."""
    h_ND = h_ND.clone().requires_grad_()
    edited_ND = edit(h_ND)
    trained = [p for module in modules for p in module.parameters()]
    gradients = torch.autograd.grad(edited_ND, [h_ND, *trained], weights_ND)
    return [edited_ND, *gradients]


def apart(modules, prefixes):
    """Each side by its own module."""

    def edit(h_ND):
        sides = h_ND[:prefixes], h_ND[prefixes:]
        return torch.cat([m(h) for m, h in zip(modules, sides, strict=True)])

    return edit


@pytest.mark.parametrize("name", INTERVENTION_CLASSES)
def test_the_second_of_a_stack_edits_as_its_intervention(name):
    modules = [build(name), build(name)]
    h_ND, weights_ND = torch.randn(2, 5, 12)

    def edit(h_ND):
        stack = affine_stack(modules)
        m_KRD = None if stack.m_KRD is None else stack.m_KRD[1:]
        return affine_rows(h_ND, AffineStack(m_KRD, stack.b_KR[1:], stack.p_KRD[1:]))

    got = step(edit, h_ND, modules[1:], weights_ND)
    expected = step(modules[1], h_ND, modules[1:], weights_ND)
    assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefixes", [0, 2, 5])
@pytest.mark.parametrize("name", INTERVENTION_CLASSES)
def test_both_sides_in_one_product_are_those_of_each(name, prefixes):
    modules = [build(name), build(name)]
    h_ND, weights_ND = torch.randn(2, 5, 12)

    def jointly(h_ND):
        mask_NC = other_side([prefixes, 5 - prefixes], 3, h_ND.device)
        return affine_rows(h_ND, affine_stack(modules), mask_NC)

    got = step(jointly, h_ND, modules, weights_ND)
    expected = step(apart(modules, prefixes), h_ND, modules, weights_ND)
    assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["loreft", "lobireft"])
def test_rotations_are_one_computation_and_those_of_each(name, computed):
    modules = [build(name), build(name)]
    p_KRD = projections(modules)
    assert computed == [2]
    for module, p_RD in zip(modules, p_KRD, strict=True):
        weights = torch.randn_like(p_RD)
        own_RD = module.rotation_matrix().T
        assert_close(p_RD, own_RD)
        got = torch.autograd.grad(p_RD, module.rotation, weights, retain_graph=True)
        assert_close(got, torch.autograd.grad(own_RD, module.rotation, weights))


def test_a_gradient_is_laid_out_as_its_parameter():
    """Else autograd would copy each of them."""
    modules = [build(), build()]
    total = projections(modules).square().sum()
    for gradient in torch.autograd.grad(total, [m.rotation for m in modules]):
        assert gradient.is_contiguous()


@torch.no_grad()
def test_a_kept_stack_is_of_the_modules_that_are_asked_for():
    cache, modules = StackCache(), [build().eval(), build().eval()]
    kept = cache.get(modules)
    assert cache.get(modules) is kept
    other = cache.get(modules[:1])
    assert len(other.b_KR) == 1
    assert_close(cache.get(modules[::-1]).b_KR, kept.b_KR.flip(0))


CHANGES = {
    "weight": lambda module: module.weight.add_(1),
    "bias": lambda module: module.bias.add_(1),
    "rotation": lambda module: module.rotation.add_(1),
    "other .data": lambda module: setattr(module.bias, "data", module.bias.data + 1),
    "mode": lambda module: module.train().eval(),
    "training": lambda module: module.train(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_kept_stack_is_built_anew_after_any_change(change):
    cache, modules = StackCache(), [build().eval(), build().eval()]
    kept = cache.get(modules)
    CHANGES[change](modules[1])
    assert cache.get(modules) is not kept
    assert_close(cache.get(modules).b_KR, affine_stack(modules).b_KR)
