"""A training step on paper: Llama 3 from 1B to 405B, and the same sums beside what was
measured.

FLOPs are counted as torch's counter does: two for a multiplication and addition of a
matrix product, attention in full, nothing for what goes element by element. Sizes are
those of the models' configs (Llama 3 herd, arXiv 2407.21783, table 3; Llama 3.2's model
cards).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from axolotl_reft.training.collators import labelled_logits
from benchmarks.base import Setting, llama_config, packed, padded, rectangle
from benchmarks.harness import RESULTS, Series, read, summary
from benchmarks.table import row

FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes: hidden size d, layers, MLP, keys' and queries' heads."""

    d: int
    layers: int
    mlp: int
    heads: int
    key_heads: int
    vocabulary: int = 128256
    tied: bool = False

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's linear modules."""
        keys = self.d // self.heads * self.key_heads
        d, mlp = self.d, self.mlp
        return [(d, d), (d, keys), (d, keys), (d, d), (d, mlp), (d, mlp), (mlp, d)]

    @property
    def layer(self) -> int:
        """Weights of a layer's linear modules."""
        return sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def head(self) -> int:
        return self.d * self.vocabulary

    @property
    def numbers(self) -> int:
        """All of the base's."""
        norms = (2 * self.layers + 1) * self.d
        return self.layers * self.layer + self.head * (2 - self.tied) + norms


LLAMAS = {
    "1B": Shape(2048, 16, 8192, 32, 8, tied=True),
    "3B": Shape(3072, 28, 8192, 24, 8, tied=True),
    "8B": Shape(4096, 32, 14336, 32, 8),
    "70B": Shape(8192, 80, 28672, 64, 8),
    "405B": Shape(16384, 126, 53248, 128, 8),
}


@dataclass(frozen=True)
class Step:
    """What is trained in a step, and on what: every layer edited, both sides untied."""

    samples: int = 8
    length: int = 1024
    positions: int = 7
    rank: int = 8

    @property
    def tokens(self) -> int:
        return self.samples * self.length


def floor_flops(shape: Shape, step: Step, edited: int) -> int:
    """Forward, and backward through activations to the lowest of so many upper layers,
    whose output is the leaf: ``floor`` of the benchmarks."""
    forward = 2 * step.tokens * (shape.layers * shape.layer + shape.head)
    attention = 4 * step.tokens * step.length * shape.d
    backward = backward_flops(shape, step, edited - 1)
    return forward + shape.layers * attention + backward


def backward_flops(shape: Shape, step: Step, layers: int) -> int:
    """Through the head and so many layers, activations alone."""
    attention = 8 * step.tokens * step.length * shape.d
    return 2 * step.tokens * (layers * shape.layer + shape.head) + layers * attention


def head_flops(shape: Shape, tokens: int) -> int:
    """Forward and backward of the logits of so many tokens, the head being frozen."""
    return 4 * tokens * shape.head


def edit_flops(d: int, rank: int, positions: int) -> int:
    """One LoReFT intervention: six products with the hidden states, forward and
    backward, and eleven of the rotation with itself."""
    return 12 * positions * d * rank + 22 * d * rank**2 + 8 * rank**3


def loreft_flops(shape: Shape, step: Step) -> int:
    """What LoReFT adds to the floor; no gradient goes below the first edit.

    The products of prefix and suffix are one, of both sides' rows and both ranks.
    """
    positions = 2 * step.samples * step.positions
    below = 2 * positions * shape.d * step.rank
    return 2 * (shape.layers * edit_flops(shape.d, step.rank, positions) - below)


def edit_bytes(shape: Shape, step: Step) -> int:
    """Read and written to put edited vectors into copies of the hidden states, once
    forward and once backward in each layer."""
    return shape.layers * 4 * step.tokens * shape.d * BFLOAT16


def lora_flops(shape: Shape, step: Step) -> int:
    """What LoRA on all linear modules adds to the floor: its own products, and the
    backward through the lowest layer down to its queries, keys and values."""
    through = backward_flops(shape, step, 1) - backward_flops(shape, step, 0)
    below = sum(inputs * (outputs + step.rank) for inputs, outputs in shape.linears[:3])
    own = 6 * step.tokens * lora_numbers(shape, step.rank)
    return own + through - 2 * step.tokens * below


def lora_numbers(shape: Shape, rank: int) -> int:
    return shape.layers * rank * sum(map(sum, shape.linears))


def loreft_numbers(shape: Shape, rank: int) -> int:
    """Trained: Householder vectors, W and b, twice a layer."""
    return 2 * shape.layers * (2 * rank * shape.d + rank)


def loreft_bytes(shape: Shape, rank: int) -> int:
    """In memory: the trained numbers and the rotations' bases, float32."""
    bases = 2 * shape.layers * rank * shape.d
    return FLOAT32 * (loreft_numbers(shape, rank) + bases)


def training_bytes(shape: Shape, rank: int) -> dict[str, int]:
    """Numbers, gradients and AdamW's two moments; the base beside them is not in it.
    Full finetuning: bfloat16 numbers and gradients, moments and a copy in float32."""
    numbers = loreft_numbers(shape, rank)
    return {
        "LoReFT": loreft_bytes(shape, rank) + 3 * FLOAT32 * numbers,
        "LoRA": 4 * FLOAT32 * lora_numbers(shape, rank),
        "full": (2 * BFLOAT16 + 3 * FLOAT32) * shape.numbers,
    }


def tables(directory: Path = RESULTS) -> str:
    """The page's tables, as Markdown."""
    step = Step()
    return "\n\n".join(
        [_size_table(step), _step_table(step), _traffic_table(step), _checks(directory)]
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        [row(header), row(["---"] * len(header)), *(row(cells) for cells in rows)]
    )


def _size_table(step: Step) -> str:
    header = ["Llama 3", "base, parameters", "LoReFT trains", "LoRA trains"]
    header += ["LoReFT, state", "LoRA, state", "full, state"]
    rows = []
    for name, shape in LLAMAS.items():
        state = training_bytes(shape, step.rank).values()
        trained = (loreft_numbers(shape, step.rank), lora_numbers(shape, step.rank))
        rows.append(
            [name, _short(shape.numbers), *map(_short, trained), *map(_bytes, state)]
        )
    return _table(header, rows)


def _step_table(step: Step) -> str:
    header = ["Llama 3", "floor, FLOPs", "of it for logits", "LoReFT adds"]
    header += ["LoRA adds", "full finetuning adds", "LoReFT copies"]
    rows = []
    for name, shape in LLAMAS.items():
        floor = floor_flops(shape, step, shape.layers)
        weights = 2 * step.tokens * (shape.layers * shape.layer + shape.head)
        parts = (
            head_flops(shape, step.tokens),
            loreft_flops(shape, step),
            lora_flops(shape, step),
            weights,
        )
        shares = [_share(value / floor) for value in parts]
        rows.append([name, _short(floor), *shares, _bytes(edit_bytes(shape, step))])
    return _table(header, rows)


def _traffic_table(step: Step) -> str:
    header = ["Llama 3", "DDP: LoReFT", "DDP: LoRA", "DDP: full"]
    header += ["FSDP2: gathered, LoReFT or LoRA", "FSDP2: full, besides"]
    rows = []
    for name, shape in LLAMAS.items():
        gradients = (
            FLOAT32 * loreft_numbers(shape, step.rank),
            FLOAT32 * lora_numbers(shape, step.rank),
            BFLOAT16 * shape.numbers,
            2 * BFLOAT16 * shape.numbers,
            BFLOAT16 * shape.numbers,
        )
        rows.append([name, *map(_bytes, gradients)])
    return _table(header, rows)


def _checks(directory: Path) -> str:
    """On paper and measured, where a result is there; medians."""
    rows = []
    for name, check in _CHECKS.items():
        for path in (directory / f"{name}.json", directory / f"{name}-gpu.json"):
            if path.exists():
                result = read(path)
                rows += [
                    [what, _setting(series), result.hardware["gpu"] or "CPU", *values]
                    for series in result.series
                    for what, *values in check(series)
                ]
    return _table(["what", "setting", "on", "computed", "measured"], rows)


def _setting(series: Series) -> str:
    setting = Setting.read(series.setting)
    size = f"d={setting.hidden_size}, {setting.layers} layers"
    rows = "" if setting.samples else f", {setting.batch}×{setting.length}"
    return size + rows * (setting.device == "cuda")


def _of(setting: Setting) -> tuple[Shape, Step]:
    """The shape that the benchmarks build, and its step."""
    config = llama_config(setting)
    shape = Shape(
        config.hidden_size,
        config.num_hidden_layers,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
    )
    step = Step(setting.batch, setting.length, setting.first, setting.rank)
    return shape, step


def _ratio(series: Series, name: str, floor: str) -> str:
    return f"{summary(series.ratios(name, floor))[1]:.3f}"


def _check_bytes(series: Series) -> list[tuple[str, str, str]]:
    shape, step = _of(Setting.read(series.setting))
    measured = summary(series.values["ours"])[1]
    paper = loreft_bytes(shape, step.rank)
    return [("adapter in memory, B", str(paper), f"{measured:.0f}")]


def _check_step(series: Series) -> list[tuple[str, str, str]]:
    shape, step = _of(Setting.read(series.setting))
    floor = floor_flops(shape, step, shape.layers)
    added = {"ours": loreft_flops(shape, step), "lora": lora_flops(shape, step)}
    return [
        (
            f"step, {name} to floor",
            f"{1 + value / floor:.3f}",
            _ratio(series, name, "floor"),
        )
        for name, value in added.items()
        if series.paired(name, "floor")
    ]


def _check_labels(series: Series) -> list[tuple[str, str, str]]:
    setting = Setting.read(series.setting)
    shape, step = _of(setting)
    # Counted here, wherever it was measured.
    inputs = rectangle(setting.but(device="cpu")).inputs
    kept = setting.batch * len(labelled_logits(inputs)["logits_to_keep"])
    added = loreft_flops(shape, step) - head_flops(shape, step.tokens - kept)
    paper = 1 + added / floor_flops(shape, step, shape.layers)
    what = f"step, labelled to floor, {setting.prompt} of {setting.length} prompt"
    return [(what, f"{paper:.3f}", _ratio(series, "labelled", "floor"))]


def _check_backward(series: Series) -> list[tuple[str, str, str]]:
    setting = Setting.read(series.setting)
    shape, step = _of(setting)
    below = {"upper": setting.layers // 2, "last": 1}
    whole = backward_flops(shape, step, setting.layers - 1)
    return [
        (
            f"backward, {name} layers to all",
            f"{backward_flops(shape, step, count - 1) / whole:.3f}",
            _ratio(series, name, "all"),
        )
        for name, count in below.items()
    ]


def _check_packing(series: Series) -> list[tuple[str, str, str]]:
    # Counted here, wherever it was measured.
    setting = Setting.read(series.setting).but(device="cpu")
    numbers = [
        sum(batch.inputs["input_ids"].numel() for batch in batches)
        for batches in (packed(setting), padded(setting))
    ]
    paper = f"{numbers[0] / numbers[1]:.3f}"
    return [
        ("epoch, ours packed to pyreft padded", paper, _ratio(series, "ours", "pyreft"))
    ]


_CHECKS = {
    "adapter-bytes": _check_bytes,
    "step-by-size": _check_step,
    "step-by-labels": _check_labels,
    "backward-by-layers": _check_backward,
    "packed-against-padded": _check_packing,
}


def _short(value: float) -> str:
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    return f"{_short(value)}B"


def _share(ratio: float) -> str:
    return f"{100 * ratio:.2g} %"
