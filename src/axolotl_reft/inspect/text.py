"""An inspected adapter as tables in the terminal, plain where the output is piped."""

from __future__ import annotations

from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from axolotl_reft.inspect.facts import AdapterFacts, LayerFacts
from axolotl_reft.inspect.probe import ProbedPrompt
from axolotl_reft.inspect.tokens import bracketed, legend, runs

_STYLES = {"prefix": "bold cyan", "suffix": "bold yellow", "all": "bold cyan"}
# Wide enough that nothing wraps where there is no terminal.
_PIPED_WIDTH = 200


def print_facts(
    facts: AdapterFacts, prompts: list[ProbedPrompt], file: TextIO | None = None
) -> None:
    """Write settings, layers and prompts to ``file``, standard output by default."""
    console = Console(file=file, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, width=_PIPED_WIDTH)
    console.print(_grid(summary(facts)))
    if facts.training:
        console.print()
        console.print(_grid(training_lines(facts.training)))
    console.print()
    console.print(_layer_table(facts))
    for line in notes(facts):
        console.print(line)
    for number, prompt in enumerate(prompts[:3], 1):
        console.print()
        edited = sum(token.edited is not None for token in prompt.tokens)
        console.print(f"prompt {number}: {len(prompt.tokens)} tokens, {edited} edited")
        console.print(_marked(prompt), soft_wrap=True)
    signs = legend(token for prompt in prompts[:3] for token in prompt.tokens)
    if signs:
        console.print()
        console.print(f"edited: {signs}", markup=False)


def summary(facts: AdapterFacts) -> list[tuple[str, str]]:
    """What the adapter is, as names and values."""
    settings = facts.settings
    ranks = sorted({layer.rank for layer in facts.layers})
    edited = [layer.layer for layer in facts.layers]
    lines = [
        ("adapter", facts.directory),
        ("method", f"{settings['peft_type']}, {settings['intervention']}"),
        ("base model", str(settings.get("base_model_name_or_path", "not named"))),
        ("layers", f"{as_ranges(edited)} ({count_layers(facts)})"),
        ("component", f"{settings['component']}, {facts.size} wide"),
        ("positions", _positions(settings)),
        ("rank", ", ".join(map(str, ranks))),
        ("parameters", _parameters(facts)),
        ("size", _size(facts.bytes)),
    ]
    if facts.lora_parameters:
        lines.append(("LoRA beside it", f"{facts.lora_parameters:,} parameters"))
    if settings.get("dropout"):
        lines.append(("dropout", str(settings["dropout"])))
    if settings.get("act_fn"):
        lines.append(("activation", settings["act_fn"]))
    if facts.trained_whole:
        names, numbers = ", ".join(facts.trained_whole), facts.trained_whole.values()
        lines.append(
            ("also saved", f"{names} (trained whole): {sum(numbers):,} parameters")
        )
    if facts.also_saved:
        lines.append(("also saved", f"{', '.join(facts.also_saved)} (not trained)"))
    version = settings.get("axolotl_reft_version")
    if version:
        lines.append(("saved by", f"axolotl-reft {version}"))
    return lines


def count_layers(facts: AdapterFacts) -> str:
    """``3 layers``, or ``1 layer``."""
    count = len(facts.layers)
    return f"{count} layer{'s' if count > 1 else ''}"


def _parameters(facts: AdapterFacts) -> str:
    if facts.all_parameters == facts.parameters:
        return f"{facts.parameters:,}"
    return f"{facts.parameters:,} of LoReFT, {facts.all_parameters:,} in all"


def _size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _positions(settings: dict[str, Any]) -> str:
    text = str(settings["positions"])
    if "+" in text:
        tied = settings["tied_weights"]
        text += ", one intervention for both" if tied else ", one intervention each"
    return text


def training_lines(training: dict[str, Any]) -> list[tuple[str, str]]:
    """How it was trained, as names and values."""
    lines = []
    if training.get("steps") is not None:
        epochs = training.get("epochs")
        lines.append(
            (
                "trained",
                f"{training['steps']} steps"
                + (f", {epochs:.3g} epochs" if epochs else ""),
            )
        )
    for key in ("loss", "eval_loss"):
        if f"last_{key}" in training:
            first, last = training[f"first_{key}"], training[f"last_{key}"]
            lines.append((key, f"{first:.4g} first, {last:.4g} last"))
    for key, value in training.get("settings", {}).items():
        if key == "datasets" and isinstance(value, list):
            value = ", ".join(str(item.get("path")) for item in value)
        lines.append((key, str(value)))
    return lines


def as_ranges(numbers: list[int]) -> str:
    """``0-3, 7`` for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def notes(facts: AdapterFacts) -> list[str]:
    """What the columns mean, for those that are there."""
    if facts.orthonormal is not None:
        lines = [
            "R: its rows are orthonormal in every layer, as they should be "
            f"(max |R Rᵀ − I| is {facts.orthonormal:.1e})"
        ]
    elif facts.has_rotation:
        lines = ["R error: max |R Rᵀ − I|, 0 for orthonormal rows, as R's should be"]
    else:
        lines = [
            "W₂ error: max |W₂ W₂ᵀ − I|; nothing makes these rows orthonormal, "
            "so it need not be small"
        ]
    if facts.layers[0].overlap is not None or facts.other:
        lines.append(
            "overlap of the subspaces written to: 1 the same, 0 orthogonal, "
            f"{facts.chance:.2g} by chance"
        )
    if facts.layers[0].edit_size:
        lines.append(
            "edit: mean of ‖Φ(h)−h‖/‖h‖ over the edited tokens of the prompts; 0 "
            "changes nothing, 1 is as large as the hidden state itself"
        )
    return lines


def columns(facts: AdapterFacts) -> list[tuple[str, list[str]]]:
    """The layers' table, column by column."""

    def values(get: Any) -> list[str]:
        return [get(layer) for layer in facts.layers]

    def by_side(name: str, field: str, form: str) -> list[tuple[str, list[str]]]:
        sides = list(
            dict.fromkeys(s for layer in facts.layers for s in getattr(layer, field))
        )

        def cell(layer: LayerFacts, side: str) -> str:
            value = getattr(layer, field).get(side)
            return "" if value is None else format(value, form)

        return [
            (f"{name} {side}", [cell(layer, side) for layer in facts.layers])
            for side in sides
        ]

    table = [
        ("layer", values(lambda x: str(x.layer))),
        ("rank", values(lambda x: str(x.rank))),
        ("parameters", values(lambda x: f"{x.parameters:,}")),
    ]
    if facts.orthonormal is None:
        name = "R error" if facts.has_rotation else "W₂ error"
        table += by_side(name, "orthogonality_error", ".1e")
    if any(layer.overlap is not None for layer in facts.layers):
        table.append(
            (
                "overlap prefix/suffix",
                values(lambda x: "" if x.overlap is None else f"{x.overlap:.3f}"),
            )
        )
    table += by_side("overlap with other,", "overlap_with", ".3f")
    table += by_side("edit", "edit_size", ".3f")
    return table


def _layer_table(facts: AdapterFacts) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    built = columns(facts)
    for name, _ in built:
        table.add_column(name, justify="right")
    for row in zip(*(cells for _, cells in built), strict=True):
        table.add_row(*row)
    return table


def _grid(lines: list[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, value in lines:
        grid.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    return grid


def _marked(prompt: ProbedPrompt) -> Text:
    line = Text()
    for edited, texts in runs(prompt.tokens):
        if edited:
            line.append(bracketed(edited, texts, keep=24), style=_STYLES[edited])
        else:
            line.append("".join(texts))
    return line
