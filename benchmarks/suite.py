"""The benchmarks that compare contestants on a model: what each builds and compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from benchmarks.base import Setting

IN_PLACE = ("floor", "ours", "lora", "pyreft")
EVERYONE = (*IN_PLACE, "pyreft-own", "adapters")
# Who can be compiled as one graph.
_COMPILED = ("floor-in-a-graph", "ours", "lora")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        task: of tasks.py.
        contestants: who takes part; ratios are to the first.
        sizes: settings by how long they take: toy, quick, full, gpu.
        unit: of a turn's value.
        fresh: on a CPU, a process for each contestant, as peak memory needs.
    """

    task: str
    contestants: tuple[str, ...]
    sizes: dict[str, list[Setting]]
    unit: str = "s"
    fresh: bool = False
    repetitions: dict[str, int] = field(default_factory=lambda: _repetitions())


def with_before(benchmark: Benchmark) -> Benchmark:
    """The benchmark with another build of this package beside ``ours``."""
    contestants = list(benchmark.contestants)
    contestants.insert(contestants.index("ours") + 1, "before")
    return replace(benchmark, contestants=tuple(contestants))


def _repetitions(quick: int = 5, full: int = 15, gpu: int = 9) -> dict[str, int]:
    return {"toy": 2, "quick": quick, "full": full, "gpu": gpu}


def _sizes(
    quick: Sequence[Setting] = (),
    full: Sequence[Setting] = (),
    gpu: Sequence[Setting] = (),
    toy: Setting | None = None,
) -> dict[str, list[Setting]]:
    sizes = {"toy": [toy or _TOY], "quick": quick, "full": full, "gpu": gpu}
    return {size: list(settings) for size, settings in sizes.items()}


_TOY = Setting(
    hidden_size=64,
    layers=2,
    rank=2,
    batch=2,
    length=40,
    prompt=20,
    vocabulary=64,
    threads=1,
)
_LARGE = Setting(hidden_size=2048, layers=4, batch=2, length=256)
_LLAMA_8B = Setting(
    hidden_size=4096,
    layers=32,
    vocabulary=128256,
    dtype="bfloat16",
    device="cuda",
    threads=0,
)
_LLAMA_1B = _LLAMA_8B.but(hidden_size=2048, layers=16)
_ON_GPU = [
    _LLAMA_8B.but(batch=8, length=1024, prompt=256),
    _LLAMA_8B.but(batch=1, length=8192, prompt=1024),
]
# So few tokens that the host, not the GPU, decides how long a step takes.
_FEW_TOKENS = _LLAMA_8B.but(batch=4, length=128)
_FEW_ON_CPU = Setting(hidden_size=256, layers=16, length=64, prompt=32)

_TOKEN_BY_TOKEN = _sizes(
    quick=[Setting(batch=1)],
    full=[
        Setting(hidden_size=512, batch=1),
        Setting(batch=1),
        _LARGE.but(batch=1),
        Setting(hidden_size=4096, layers=4, batch=1),
    ],
    gpu=[_ON_GPU[0]],
)

# Where the head is a fifth of the model, as in Llama 3's 1B, or a fifteenth, as in 8B,
# and a quarter, half, or nine tenths of the tokens are prompt.
_BY_LABELS = _sizes(
    quick=[Setting(vocabulary=32000, prompt=128)],
    full=[Setting(vocabulary=32000, prompt=prompt) for prompt in (64, 128, 230)],
    gpu=[
        llama.but(batch=8, length=1024, prompt=prompt)
        for llama in (_LLAMA_1B, _LLAMA_8B)
        for prompt in (256, 922)
    ],
)

# Of long prompts, and short ones.
_LAST = Setting(first=0, length=512, prompt=480)
_FROZEN = _sizes(
    toy=_TOY.but(first=0, last=3),
    quick=[_LAST.but(hidden_size=512, length=256, prompt=240)],
    full=[
        _LAST,
        _LAST.but(hidden_size=512, length=256, prompt=240),
        _LAST.but(length=256, prompt=64),
    ],
    gpu=[_LLAMA_8B.but(first=0, batch=8, length=1024, prompt=922)],
)
_IN_TWO_PARTS = ("labelled", "frozen", "kept")
_BESIDE = (*_IN_TWO_PARTS, "floor", "lora")

# Of a few samples, with answers of as many tokens or few.
_RULE = [
    Setting(hidden_size=d, layers=4, first=0, vocabulary=512, length=length).but(
        batch=batch, prompt=prompt
    )
    for d in (64, 256, 512, 1024)
    for batch, length, prompt in (
        (4, 64, 16),
        (4, 64, 32),
        (4, 64, 56),
        (4, 256, 32),
        (4, 256, 64),
        (4, 256, 128),
        (4, 256, 240),
    )
]

SUITE: dict[str, Benchmark] = {
    "step-by-size": Benchmark(
        "training_step",
        EVERYONE,
        _sizes(
            quick=[Setting(hidden_size=512), Setting(), _LARGE],
            full=[
                Setting(hidden_size=512),
                Setting(),
                _LARGE,
                Setting(hidden_size=4096, layers=2, batch=1),
            ],
            gpu=_ON_GPU,
        ),
        repetitions=_repetitions(quick=5, full=11),
    ),
    # pyreft's and AdapterHub's d×d bases would not fit beside this one.
    "step-at-8192": Benchmark(
        "training_step",
        ("floor", "ours", "lora"),
        _sizes(
            full=[Setting(hidden_size=8192, layers=1, batch=1, length=128)],
        ),
        repetitions=_repetitions(quick=3, full=7),
    ),
    "step-by-rank": Benchmark(
        "training_step",
        ("floor", "ours", "lora"),
        _sizes(
            quick=[Setting(rank=rank) for rank in (1, 16)],
            full=[_LARGE.but(rank=rank) for rank in (1, 4, 8, 16, 32, 64)],
            gpu=[_ON_GPU[0].but(rank=rank) for rank in (1, 16, 64)],
        ),
        repetitions=_repetitions(quick=5, full=9, gpu=5),
    ),
    "step-by-layers": Benchmark(
        "training_step",
        ("floor", "ours", "lora"),
        _sizes(
            full=[Setting(layers=layers, batch=2) for layers in (2, 4, 8, 16, 32)],
        ),
        repetitions=_repetitions(quick=3, full=9),
    ),
    "step-by-positions": Benchmark(
        "training_step",
        ("floor", "ours"),
        _sizes(
            full=[Setting(first=n, last=n, prompt=192) for n in (1, 7, 32, 96)],
        ),
        repetitions=_repetitions(quick=3, full=9),
    ),
    "step-by-batch": Benchmark(
        "training_step",
        ("floor", "ours", "lora"),
        _sizes(
            full=[
                Setting(batch=batch, length=length)
                for batch, length in ((1, 128), (8, 128), (1, 1024), (4, 512))
            ],
            gpu=[
                _FEW_TOKENS,
                _LLAMA_1B.but(batch=8, length=1024, prompt=256),
                _LLAMA_1B.but(batch=4, length=256),
            ],
        ),
        repetitions=_repetitions(quick=3, full=9, gpu=15),
    ),
    # So few tokens that what an adapter does around its arithmetic decides.
    "step-of-few-tokens": Benchmark(
        "training_step",
        ("floor", "ours", "lora"),
        _sizes(quick=[_FEW_ON_CPU], full=[_FEW_ON_CPU]),
        repetitions=_repetitions(quick=41, full=121),
    ),
    "steps-in-a-row": Benchmark(
        "steps_in_a_row",
        ("floor", "ours", "labelled"),
        _sizes(
            gpu=[_FEW_TOKENS, _LLAMA_1B.but(batch=8, length=1024, prompt=256)],
        ),
        repetitions=_repetitions(gpu=7),
    ),
    "compiled-step": Benchmark(
        "compiled_step",
        _COMPILED,
        _sizes(
            full=[_FEW_ON_CPU, Setting()],
            gpu=[_LLAMA_1B.but(batch=4, length=256)],
        ),
        repetitions=_repetitions(full=31),
    ),
    "compiled-launches": Benchmark(
        "compiled_launches",
        _COMPILED,
        _sizes(
            quick=[Setting(hidden_size=64, layers=4, length=64, prompt=32)],
            full=[
                Setting(hidden_size=64, layers=layers, length=64, prompt=32)
                for layers in (4, 8, 16)
            ],
            gpu=[_LLAMA_1B.but(batch=4, length=256)],
        ),
        unit="launches",
        repetitions={"toy": 1, "quick": 1, "full": 1, "gpu": 1},
    ),
    "step-by-labels": Benchmark(
        "training_step",
        ("floor", "ours", "labelled", "lora"),
        _BY_LABELS,
        repetitions=_repetitions(full=9, gpu=5),
    ),
    "memory-by-labels": Benchmark(
        "peak_memory",
        ("floor", "ours", "labelled", "lora"),
        _BY_LABELS,
        unit="B",
        fresh=True,
        repetitions={"toy": 1, "quick": 1, "full": 1, "gpu": 1},
    ),
    "packed-against-padded": Benchmark(
        "ragged",
        ("pyreft", "ours", "labelled"),
        _sizes(
            toy=_TOY.but(samples=4),
            quick=[Setting(samples=16, batch=8, length=512)],
            full=[
                Setting(samples=64, batch=16, length=512),
                Setting(hidden_size=2048, layers=4, samples=48, batch=16, length=512),
            ],
            gpu=[_LLAMA_8B.but(samples=128, batch=16, length=4096)],
        ),
        repetitions=_repetitions(quick=3, full=5, gpu=3),
    ),
    # The same with a head that is a fifth of the model, as in Llama 3's 1B.
    "packed-with-a-head": Benchmark(
        "ragged",
        ("pyreft", "ours", "labelled"),
        _sizes(
            toy=_TOY.but(samples=4),
            full=[_LARGE.but(samples=48, batch=16, length=512, vocabulary=32000)],
            gpu=[_LLAMA_1B.but(samples=128, batch=16, length=4096)],
        ),
        repetitions=_repetitions(quick=3, full=5, gpu=3),
    ),
    "kernels": Benchmark(
        "training_step",
        ("floor", "ours", "operations"),
        _sizes(gpu=[_FEW_TOKENS, _ON_GPU[0]]),
    ),
    "launches": Benchmark(
        "launches",
        ("floor", "ours", "operations", "lora"),
        _sizes(quick=[Setting(hidden_size=64, batch=1)], gpu=[_FEW_TOKENS]),
        unit="launches",
        repetitions={"toy": 1, "quick": 1, "full": 1, "gpu": 1},
    ),
    "edit-log": Benchmark(
        "logged_step",
        ("ours", "logged"),
        _sizes(quick=[Setting()], full=[Setting(), _LARGE], gpu=[_ON_GPU[0]]),
    ),
    "backward-by-layers": Benchmark(
        "backward",
        ("all", "upper", "last"),
        _sizes(
            quick=[Setting()],
            full=[Setting(), _LARGE.but(layers=8, batch=1)],
            gpu=[_ON_GPU[0]],
        ),
    ),
    "prefill": Benchmark(
        "prefill",
        ("base", "ours"),
        _sizes(
            quick=[Setting(batch=1)],
            full=[
                Setting(batch=1),
                _LARGE.but(batch=1),
                Setting(hidden_size=4096, layers=4, batch=1),
            ],
            gpu=[_ON_GPU[0]],
        ),
    ),
    # Its ratios are within a few hundredths of 1, and turns short.
    "decode": Benchmark(
        "decode",
        ("base", "ours", "by-peft"),
        _TOKEN_BY_TOKEN,
        repetitions=_repetitions(full=121, gpu=61),
    ),
    "generate": Benchmark(
        "generate",
        ("base", "ours"),
        _TOKEN_BY_TOKEN,
    ),
    # Eight choices of eight tokens after a context of 480.
    "multiple-choice": Benchmark(
        "multiple_choice",
        ("whole-rows", "ours"),
        _sizes(
            toy=_TOY.but(length=110, prompt=100),
            quick=[Setting(batch=8, length=487, prompt=480)],
            full=[
                Setting(batch=8, length=487, prompt=480),
                Setting(batch=4, length=135, prompt=120),
            ],
            gpu=[_LLAMA_8B.but(batch=8, length=487, prompt=480)],
        ),
        repetitions=_repetitions(full=9),
    ),
    "generate-with-many-adapters": Benchmark(
        "many_adapters",
        ("fresh", "ours"),
        _sizes(
            toy=_TOY.but(batch=1, first=0),
            quick=[Setting(batch=1, length=480, prompt=480, first=0)],
            full=[Setting(batch=1, length=480, prompt=480, first=0)],
            gpu=[_LLAMA_8B.but(batch=1, length=480, prompt=480, first=0)],
        ),
        repetitions=_repetitions(full=9),
    ),
    "first-adapter": Benchmark(
        "first_adapter",
        ("lora", "ours"),
        _sizes(quick=[_FEW_ON_CPU], full=[_FEW_ON_CPU]),
        fresh=True,
        repetitions=_repetitions(quick=5, full=15),
    ),
    "peak-memory": Benchmark(
        "peak_memory",
        EVERYONE,
        _sizes(
            quick=[Setting()],
            full=[Setting(), _LARGE, Setting(hidden_size=4096, layers=2, batch=1)],
            gpu=_ON_GPU,
        ),
        unit="B",
        fresh=True,
        repetitions={"toy": 1, "quick": 1, "full": 3, "gpu": 1},
    ),
    "frozen-prompt": Benchmark(
        "training_step",
        _BESIDE,
        _FROZEN,
        repetitions=_repetitions(full=9),
    ),
    "frozen-prompt-memory": Benchmark(
        "peak_memory",
        _BESIDE,
        _FROZEN,
        unit="B",
        fresh=True,
        repetitions={"toy": 1, "quick": 1, "full": 1, "gpu": 1},
    ),
    # Few-shot examples before every sample, on SmolLM2-135M's shape.
    "shared-prompt": Benchmark(
        "shared_prompt_step",
        _IN_TWO_PARTS,
        _sizes(
            toy=_TOY.but(first=0, shared=12),
            full=[
                Setting(
                    hidden_size=576,
                    layers=30,
                    first=0,
                    batch=8,
                    length=230,
                    prompt=220,
                    shared=200,
                    vocabulary=49152,
                    base="smollm2",
                )
            ],
            gpu=[_LLAMA_8B.but(first=0, batch=8, length=1024, prompt=922, shared=850)],
        ),
        repetitions=_repetitions(full=9),
    ),
    "frozen-prompt-preference": Benchmark(
        "preference_step",
        ("ours", "frozen", "kept"),
        _sizes(
            toy=_TOY.but(first=0),
            full=[_LAST.but(batch=2)],
            gpu=[_LLAMA_8B.but(first=0, batch=4, length=1024, prompt=922)],
        ),
        repetitions=_repetitions(full=9),
    ),
    # Prefixes, dropout in the base, and too few tokens before the edited ones.
    "not-frozen": Benchmark(
        "training_step",
        ("labelled", "auto"),
        _sizes(
            full=[
                _FEW_ON_CPU,
                _FEW_ON_CPU.but(first=0, base="gpt2"),
                _FEW_ON_CPU.but(first=0, prompt=12),
            ],
            gpu=[_FEW_TOKENS],
        ),
        repetitions=_repetitions(full=121),
    ),
    "frozen-prompt-rule": Benchmark(
        "training_step",
        _IN_TWO_PARTS,
        _sizes(toy=_TOY.but(first=0), full=_RULE),
        repetitions=_repetitions(full=9),
    ),
}
