#!/usr/bin/env bash
# One would guess: torch.compile gives what the uncompiled function gives, or refuses.
#
# What happens: an autograd.Function whose forward takes `ctx`, one argument and then any
# number of tensors is called without its ctx when it is compiled with gradients off and
# gets exactly two tensors. Every argument moves one place to the front: the first is
# taken for ctx, the first tensor for the first argument, and one tensor is left. With
# one tensor, with three, and with gradients on, the result is right. Nothing is said;
# where the moved arguments happen to fit, the numbers are wrong.
#
# Version: torch 2.13.0 (CPU), Python 3.11.
# Source: running this; and torch/_dynamo/variables/misc.py, where
# AutogradFunctionVariable.call_apply leaves the ctx out if there are as many arguments
# as forward's signature has parameters, of which *tensors counts as one.
#
# Met in: the rotations of a layer with two interventions, compiled for evaluation.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$work/venv/bin/python" - <<'PYTHON'
import torch


class Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, labels, *tensors):
        return tensors[0] * len(labels) + 10 * sum(tensors)

    @staticmethod
    def backward(ctx, grad):
        return None, *[grad] * (len(ctx.needs_input_grad) - 1)


print("torch", torch.__version__)
wrong = []
for gradients in (True, False):
    for count in (1, 2, 3):
        tensors = [torch.ones(2, requires_grad=gradients) for _ in range(count)]

        def call(tensors):
            return Weighted.apply(["only"], *tensors)

        torch._dynamo.reset()
        with torch.set_grad_enabled(gradients):
            expected = call(tensors)
            compiled = torch.compile(call, backend="eager", fullgraph=True)
            got = compiled(tensors)
        print(
            f"gradients {gradients}, {count} tensors:",
            f"uncompiled {expected.tolist()}, compiled {got.tolist()}",
        )
        if not torch.equal(expected, got):
            wrong.append((gradients, count))
assert wrong == [(False, 2)], f"this has changed: {wrong}"
PYTHON
