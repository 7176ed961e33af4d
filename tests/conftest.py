"""Tiny random models of every supported architecture, made here; nothing is fetched."""

import gc
import os
import sys

# Before torch: two workers' threads on two cores make tiny steps ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
# Compiling what packs samples takes each process 15 s, packing a few no time.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from optional_packages import TESTS, missing, needed
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from axolotl_reft import LoreftConfig
from axolotl_reft.core import affine

# Modules that import what is not installed are not collected: their import would fail.
collect_ignore = [
    str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py") if missing(path)
]


def pytest_report_header() -> list[str]:
    """Say what is left out, and for want of which packages."""
    packages = {name for path in TESTS.rglob("test_*.py") for name in missing(path)}
    if not packages:
        return []
    return [
        f"{len(collect_ignore)} test modules are left out, for want of "
        f"{', '.join(sorted(packages))}"
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of modules that import axolotl or vllm."""
    for item in items:
        for package in needed(Path(item.path)) & {"axolotl", "vllm"}:
            item.add_marker(package)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from what was imported: axolotl calls it five times a
    training, which takes longer than training a tiny model."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Else triton's bindings report leaks at the end."""
    gc.unfreeze()


VOCABULARY = 64
HIDDEN = 32
LAYERS = 3

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "gemma3_text": {},
    "phi3": {},
    "mixtral": {"num_local_experts": LAYERS, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, **_EXPERTS},
    "gpt2": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
}


def build_model(architecture: str = "llama", **overrides: object) -> PreTrainedModel:
    """A random model; the same weights at every call with the same arguments."""
    settings = {**_COMMON, **ARCHITECTURES[architecture], **overrides}
    if architecture == "gpt2":
        kept = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "n_")
        settings = {k: v for k, v in settings.items() if k.startswith(kept)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **settings)
    # Larger weights than usual, so that an edit at a wrong place shows in the logits.
    config.initializer_range = 0.2
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def build_adapter(
    base: PreTrainedModel, seed: int = 1, **settings: object
) -> PeftModel:
    """The base with a random adapter, every number of it away from its start."""
    torch.manual_seed(seed)
    defaults = {"task_type": "CAUSAL_LM", "positions": "f2+l3"}
    config = LoreftConfig(**defaults | settings)
    model = get_peft_model(base, config).eval()
    move_parameters(model, 0.2)
    return model


@torch.no_grad()
def move_parameters(model: nn.Module, scale: float) -> None:
    """Move every trained parameter at random."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * scale)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On several, the order of a sum depends on the shape that it is part of."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rotations each computation made, in the order of the computations."""
    counts: list[int] = []
    made = affine.rotations
    monkeypatch.setattr(
        affine,
        "rotations",
        lambda vectors, bases: counts.append(len(vectors)) or made(vectors, bases),
    )
    return counts


@pytest.fixture(autouse=True)
def _axolotl_forgets_plugins() -> Iterator[None]:
    """axolotl keeps every plugin of every config it read, for the whole process: one
    test's DiffusionPlugin would train the next test's model."""
    before = _plugins_of_axolotl().copy()
    yield
    # In place: axolotl's modules hold on to the manager they were imported with.
    after = _plugins_of_axolotl()
    after.clear()
    after.update(before)


def _plugins_of_axolotl() -> dict[str, object]:
    integrations = sys.modules.get("axolotl.integrations.base")
    return integrations.PluginManager.get_instance().plugins if integrations else {}


@pytest.fixture
def tokens() -> Callable[..., torch.Tensor]:
    """``tokens(rows, columns)``: ids without specials, the same at every call."""

    def make(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCABULARY, (rows, columns), generator=generator)

    return make


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def batch(tokens):
    """Two rows of a prompt of 7 tokens and an answer of 5."""
    ids = tokens(2, 12)
    return {"input_ids": ids, "labels": ids.where(torch.arange(12) >= 7, -100)}


@pytest.fixture
def model() -> PeftModel:
    """A model in training."""
    return build_adapter(build_model(), positions="f2+l3").train()
