"""Trainings by transformers' Trainer in several processes, and the processes' start."""

import os
import socket
from pathlib import Path

import torch
from accelerate import PartialState
from conftest import VOCABULARY, build_model
from forks import fork
from peft import get_peft_model
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from axolotl_reft import LoreftConfig

STEPS = 4
GLOBAL_BATCH = 4


def launch(functions, processes, directory):
    """Run each ``function(rank, directory)`` in processes that know of each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        fork(_run, functions, rank, processes, port, directory)
        for rank in range(processes)
    ]


def join(workers, timeout=180):
    """Wait for all; a hang or an error in one fails."""
    for worker in workers:
        worker.join(timeout)
    hung = [worker for worker in workers if worker.is_alive()]
    for worker in hung:
        worker.kill()
    assert not hung, "a process hangs"
    assert all(worker.exitcode == 0 for worker in workers)


def _run(functions, rank, processes, port, directory):
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
    if processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    PartialState(cpu=True)
    for function in functions:
        function(rank, Path(directory))


def samples():
    """Ragged; of each four, the first two are the first process's.

    In the second step the second process has no prompt, in the third the first has
    nothing but padding, and in the last neither has a prompt.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(STEPS * GLOBAL_BATCH):
        length = 6 + number % 5
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[: 2 + number % 4] = -100
        step, process = number // GLOBAL_BATCH, number % GLOBAL_BATCH // 2
        if (step, process) in ((1, 1), (3, 0), (3, 1)):
            labels = ids.clone()
        if (step, process) == (2, 0):
            labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        made.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return made


def collate(rows):
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        key: torch.nn.utils.rnn.pad_sequence(
            [row[key] for row in rows], batch_first=True, padding_value=value
        )
        for key, value in fill.items()
    }


class InOrder(Trainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


def trainer(model, directory, accumulate=1, **arguments):
    processes = int(os.environ.get("WORLD_SIZE", 1))
    settings = {
        "output_dir": str(directory),
        "per_device_train_batch_size": GLOBAL_BATCH // processes,
        "gradient_accumulation_steps": accumulate,
        "max_steps": STEPS // accumulate,
        "learning_rate": 0.5,
        # Not Adam: it makes large steps of the rounding of gradients that are zero.
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        # As axolotl has it.
        "ddp_find_unused_parameters": False,
    }
    return InOrder(
        model,
        args=TrainingArguments(**settings | arguments),
        train_dataset=samples(),
        data_collator=collate,
    )


def adapted(seed=1, dtype=torch.float32, **settings):
    base = build_model().to(dtype)
    torch.manual_seed(seed)
    defaults = {"task_type": "CAUSAL_LM", "positions": "f2+l3", "rank": 3}
    return get_peft_model(base, LoreftConfig(**defaults | settings)).train()


REENTRANT = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
}
PLAIN_CHECKPOINTS = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}
UNTIED = {"tied_weights": False}
INSIDE = {"component": "mlp_output", **UNTIED}
DDP_CASES = {
    "tied": ({}, {}),
    "untied": (UNTIED, {}),
    "every position": ({"positions": "all"}, {}),
    "upper layer": ({"layers": [-1]}, {}),
    "inside a layer": (INSIDE, {}),
    "bias only": ({"intervention": "consreft"}, {}),
    "LoRA beside it": ({"lora": {"r": 2}}, {}),
    "no rotation": ({"intervention": "noreft", **UNTIED}, {}),
    "accumulated": (UNTIED, {"accumulate": 2}),
    "reentrant checkpoints": (UNTIED, REENTRANT),
    "reentrant checkpoints inside a layer": (INSIDE, REENTRANT),
    "plain checkpoints inside a layer": (INSIDE, PLAIN_CHECKPOINTS),
    "reentrant checkpoints, accumulated": (UNTIED, {"accumulate": 2, **REENTRANT}),
    "no buffers broadcast": (UNTIED, {"ddp_broadcast_buffers": False}),
}


def train_replicated(rank, directory):
    """Every case; the losses and the trained adapter of each into one file."""
    results = {}
    for name, (settings, arguments) in DDP_CASES.items():
        # Other numbers in each process: the first's must reach the others.
        alike = arguments.get("ddp_broadcast_buffers") is False
        model = adapted(seed=1 if alike else 1 + rank, **settings)
        if "gradient_checkpointing" in arguments:
            model.enable_input_require_grads()
        run = trainer(model, directory, **arguments)
        run.train()
        losses = [e["loss"] for e in run.state.log_history if "loss" in e]
        numbers = {k: v for k, v in model.state_dict().items() if ".intv_" in k}
        results[name] = (losses, numbers)
    torch.save(results, directory / f"replicated{rank}.pt")
