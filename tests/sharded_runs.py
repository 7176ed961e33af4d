"""The same for FSDP2, whose plugin accelerate does not use on a CPU: the model is
prepared by accelerate's and axolotl's own functions, and stepped by hand."""

import os
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import fsdp_utils
from axolotl.monkeypatch.accelerate import fsdp2
from axolotl.utils.dict import DictDefault
from distributed_runs import (
    GLOBAL_BATCH,
    INSIDE,
    STEPS,
    UNTIED,
    adapted,
    collate,
    samples,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.tensor import DTensor

from axolotl_reft import LoreftPlugin
from axolotl_reft.tuner.lora import LayerLora


def _accelerator(mixed_precision=None, **settings):
    """What the two functions that prepare a model ask of an Accelerator."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        **{"cpu_ram_efficient_loading": False} | settings,
    )
    if mixed_precision:
        plugin.set_mixed_precision(mixed_precision)
    state = SimpleNamespace(fsdp_plugin=plugin, device_mesh=None)
    rank = dist.get_rank()
    return SimpleNamespace(
        state=state,
        device=torch.device("cpu"),
        mixed_precision="no",
        is_main_process=rank == 0,
        is_fsdp2=True,
        num_processes=dist.get_world_size(),
        process_index=rank,
        wait_for_everyone=dist.barrier,
    )


class _TorchWithoutCuda:
    """axolotl puts what is not sharded on "cuda"; here it goes to the CPU."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def device(name):
        return torch.device("cpu" if name == "cuda" else name)


def by_axolotl(model, **settings):
    cfg = DictDefault({"adapter": "loreft", "fsdp_version": 2})
    LoreftPlugin().post_model_load(cfg, model)
    fsdp2.torch = _TorchWithoutCuda()
    try:
        accelerator = _accelerator(**settings)
        fsdp2.fsdp2_prepare_model(accelerator, model)
    finally:
        fsdp2.torch = torch
    return accelerator


def by_accelerate(model, **settings):
    accelerator = _accelerator(**settings)
    fsdp_utils.fsdp2_prepare_model(accelerator, model)
    return accelerator


EVERYWHERE = {"positions": "all"}
BF16 = {"dtype": torch.bfloat16}
MIXED = {"mixed_precision": "bf16"}
LORA = {"lora": {"r": 2, "target_modules": ["q_proj", "down_proj"]}}
# How the model is made, and how it is prepared.
FSDP_CASES = {
    "by accelerate": (UNTIED, by_accelerate, {}),
    "bfloat16 base": (UNTIED | BF16, by_axolotl, {}),
    "mixed precision": (UNTIED | BF16, by_axolotl, MIXED),
    "mixed precision, every position": (EVERYWHERE | BF16, by_axolotl, MIXED),
    "mixed precision, inside a layer": (INSIDE | BF16, by_axolotl, MIXED),
    "LoRA beside it": (UNTIED | LORA, by_axolotl, {}),
    # What LoRA adds comes out of its group in the dtype of mixed precision.
    "LoRA beside it, mixed precision": (UNTIED | LORA | BF16, by_axolotl, MIXED),
    "loaded by the first process": (
        UNTIED,
        by_axolotl,
        {"cpu_ram_efficient_loading": True},
    ),
    "checkpointed by FSDP": (UNTIED, by_axolotl, {"activation_checkpointing": True}),
    # In one group with the rest, they are rounded to its mixed precision.
    "rounded": (UNTIED | BF16, by_accelerate, MIXED),
}
PROBE = torch.arange(3, 11).view(1, 8)


def train_sharded(rank, directory):
    """Every case; losses, and the adapter saved by the first process."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    results = {}
    for name, (settings, prepare, arguments) in FSDP_CASES.items():
        # FSDP2 takes each process's own numbers, unless the first one loads for all.
        seed = 1 + rank if "cpu_ram_efficient_loading" in arguments else 1
        model = adapted(seed=seed, **settings)
        model.config.use_cache = False
        lent = set()
        if processes > 1:
            accelerator = prepare(model, **arguments)
            _watch(model, lent)
        losses = [step(model, number, rank, processes) for number in range(STEPS)]
        trained = [key for key, p in model.named_parameters() if p.requires_grad]
        state = model.state_dict()
        kinds = {type(state[key]) is DTensor for key in trained}
        if processes > 1:
            state = _saved(model, accelerator, rank, directory / name)
        with torch.no_grad():
            logits = model.eval()(PROBE).logits.float()
        numbers = {key: t for key, t in state.items() if ".intv_" in key}
        results[name] = (losses, numbers, sorted(trained), lent, kinds, logits)
    torch.save(results, directory / f"sharded{rank}.pt")


def _watch(model, lent):
    """Note as what, and in which dtype, the adapter's parameters are seen."""

    def note(module, inputs):
        lent.update((type(p).__name__, p.dtype) for p in module.parameters())

    for module in model.modules():
        if "rotation" in module._parameters or isinstance(module, LayerLora):
            module.register_forward_pre_hook(note)


def step(model, number, rank, processes):
    """One step of SGD on the global batch, of which each process computes its rows; one
    process computes all in turn, in pieces of the same rounding. Its loss."""
    rows = samples()[number * GLOBAL_BATCH :][:GLOBAL_BATCH]
    shares = [collate(rows[:2]), collate(rows[2:])]
    count = sum((share["labels"][:, 1:] != -100).sum() for share in shares)
    total = torch.zeros(())
    for share in shares if processes == 1 else [shares[rank]]:
        logits = model(**share).logits[:, :-1].float().flatten(0, 1)
        labels = share["labels"][:, 1:].flatten()
        loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        # FSDP averages gradients over processes.
        (loss * processes / count).backward()
        total += loss.detach() / count
    for parameter in model.parameters():
        if parameter.grad is not None:
            with torch.no_grad():
                parameter.sub_(parameter.grad, alpha=0.5)
            parameter.grad = None
    if processes > 1:
        dist.all_reduce(total)
    return total.item()


def _saved(model, accelerator, rank, directory):
    """Saved as transformers' Trainer saves a model and as it saves a checkpoint, and
    the checkpoint loaded again; the whole state."""
    options = StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True
    )
    whole = get_model_state_dict(model, options=options)
    if rank == 0:
        model.save_pretrained(directory, state_dict=whole)
    plugin = accelerator.state.fsdp_plugin
    plugin.set_state_dict_type("SHARDED_STATE_DICT")
    checkpoint = (plugin, accelerator, model, str(directory / "checkpoint"))
    fsdp_utils.save_fsdp_model(*checkpoint, adapter_only=True)
    dist.barrier()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if ".intv_" in key:
                tensor.zero_()
    fsdp_utils.load_fsdp_model(*checkpoint, adapter_only=True)
    return get_model_state_dict(model, options=options)
