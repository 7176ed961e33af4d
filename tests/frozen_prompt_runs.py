"""Trainings in two parts in several processes: replicated, and sharded by FSDP2.

Of each four samples the first two are the first process's. In the second step the
second process has no prompt, in the third the first has nothing but padding, and in the
last neither has a prompt: they compute their batches as a whole.
"""

import os

import torch
from distributed_runs import STEPS, adapted, collate, samples, trainer
from sharded_runs import by_accelerate, step

from axolotl_reft import use_frozen_prompt
from axolotl_reft.tuner.model import hooks_of

EPOCHS = 2
# By name: whether it is sharded, settings of the plugin for FSDP, and how much each
# process keeps.
CASES = {
    "replicated": (False, {}, ("1MB", "1MB")),
    "kept by one": (False, {}, ("1MB", 0)),
    "sharded": (True, {}, ("1MB", "1MB")),
    "sharded, kept by one": (True, {}, ("1MB", 0)),
    "sharded, not between forward and backward": (
        True,
        {"reshard_after_forward": False},
        ("1MB", "1MB"),
    ),
}


def train_in_two_parts(rank, directory):
    """Every case; losses, adapter, and tokens computed without gradients by step."""
    processes, results = int(os.environ.get("WORLD_SIZE", 1)), {}
    for name, (is_sharded, settings, caches) in CASES.items():
        for when in (True, False):
            model = adapted(positions="l2")
            model.config.use_cache = False
            use_frozen_prompt(model, when, caches[rank])
            without = _count_without_gradients(model)
            steps = EPOCHS * STEPS
            if is_sharded:
                if processes > 1:
                    by_accelerate(model, **settings)
                losses = []
                for number in range(steps):
                    losses.append(step(model, number % STEPS, rank, processes))
                    _evaluate(model, rank)
                    without[-1] = 0
            else:
                run = trainer(model, directory, max_steps=steps)
                run.train()
                losses = [e["loss"] for e in run.state.log_history if "loss" in e]
            numbers = {
                key: getattr(tensor, "full_tensor", lambda t=tensor: t)().clone()
                for key, tensor in model.state_dict().items()
                if ".intv_" in key
            }
            results[name, when] = losses, numbers, without
    torch.save(results, directory / f"frozen{rank}.pt")


@torch.no_grad()
def _evaluate(model, rank):
    """Leave the layers as forwards without backward leave them."""
    batch = collate(samples()[2 * rank :][:2])
    losses = {model.eval()(**batch).loss.item() for _ in range(2)}
    assert len(losses) == 1
    model.train()


def _count_without_gradients(model):
    """How many tokens the first layer is given without gradients, by forward with
    gradients."""
    counts = [0]

    def note(layer, args, output):
        if torch.is_grad_enabled():
            counts.append(0)
        else:
            counts[-1] += args[0].shape[0] * args[0].shape[1]

    hooks = hooks_of(model.get_base_model())
    hooks.model.get_submodule(hooks.layers)[0].register_forward_hook(note)
    return counts
