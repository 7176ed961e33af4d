"""Print an adapter's facts as tables: styled in a terminal, plain where piped.

rich is imported when something is printed.
"""

from __future__ import annotations

from typing import Any

from axolotl_reft.inspect.facts import AdapterFacts
from axolotl_reft.inspect.probe import ProbedPrompt
from axolotl_reft.inspect.tokens import legend, runs

_STYLES = {"": "", "prefix": "bold cyan", "suffix": "bold yellow", "all": "bold cyan"}
# Wide enough that nothing wraps where there is no terminal.
_PIPED_WIDTH = 200
_MOST_PROMPTS = 3


def print_facts(facts: AdapterFacts, prompts: list[ProbedPrompt]) -> None:
    """Print settings, layers and the first prompts."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPED_WIDTH)
    for lines in filter(None, (summary(facts), training_lines(facts.training))):
        grid = Table.grid(padding=(0, 2))
        for name, value in lines:
            grid.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
        console.print(grid)
        console.print()
    table = Table(box=box.SIMPLE, pad_edge=False)
    by_name = columns(facts)
    for name in by_name:
        table.add_column(name, justify="right")
    for row in zip(*by_name.values(), strict=True):
        table.add_row(*row)
    console.print(table)
    for line in notes(facts):
        console.print(line)
    shown = prompts[:_MOST_PROMPTS]
    for number, prompt in enumerate(shown, 1):
        edited = sum(token.edited is not None for token in prompt.tokens)
        console.print(
            f"\nprompt {number}: {len(prompt.tokens)} tokens, {edited} edited"
        )
        pieces = ((text, _STYLES[side]) for side, text in runs(prompt.tokens))
        console.print(Text.assemble(*pieces), soft_wrap=True)
    signs = legend(token for prompt in shown for token in prompt.tokens)
    if signs:
        console.print(f"\nedited: {signs}", markup=False)


def summary(facts: AdapterFacts) -> list[tuple[str, str]]:
    """Return names and values of what the adapter is."""
    settings = facts.settings
    layers = as_ranges([layer.layer for layer in facts.layers])
    ranks = sorted({layer.rank for layer in facts.layers})
    positions, parameters = str(settings["positions"]), f"{facts.parameters:,}"
    if "+" in positions:
        each = "for both" if settings["tied_weights"] else "each"
        positions += f", one intervention {each}"
    if facts.all_parameters != facts.parameters:
        parameters += f" of LoReFT, {facts.all_parameters:,} in all"
    kb = facts.bytes / 1e3
    lines = [
        ("adapter", facts.directory),
        ("method", f"{settings['peft_type']}, {settings['intervention']}"),
        ("base model", str(settings.get("base_model_name_or_path", "not named"))),
        ("layers", f"{layers} ({count_layers(facts)})"),
        ("component", f"{settings['component']}, {facts.size} wide"),
        ("positions", positions),
        ("rank", ", ".join(map(str, ranks))),
        ("parameters", parameters),
        ("size", f"{kb / 1e3:,.2f} MB" if kb >= 1e3 else f"{kb:,.1f} kB"),
    ]
    if facts.lora_parameters:
        lines.append(("LoRA beside it", f"{facts.lora_parameters:,} parameters"))
    if settings.get("dropout"):
        lines.append(("dropout", str(settings["dropout"])))
    if settings.get("act_fn"):
        lines.append(("activation", settings["act_fn"]))
    if facts.trained_whole:
        names, count = ", ".join(facts.trained_whole), sum(facts.trained_whole.values())
        lines.append(("also saved", f"{names} (trained whole): {count:,} parameters"))
    if facts.also_saved:
        lines.append(("also saved", f"{', '.join(facts.also_saved)} (not trained)"))
    if settings.get("axolotl_reft_version"):
        lines.append(("saved by", f"axolotl-reft {settings['axolotl_reft_version']}"))
    return lines


def training_lines(training: dict[str, Any]) -> list[tuple[str, str]]:
    """Return names and values of how the adapter was trained."""
    if not training:
        return []
    epochs = training["epochs"]
    length = f"{training['steps']} steps" + (f", {epochs:.3g} epochs" if epochs else "")
    losses = [
        (k, f"{training[f'first_{k}']:.4g} first, {training[f'last_{k}']:.4g} last")
        for k in ("loss", "eval_loss")
        if f"last_{k}" in training
    ]
    return [("trained", length), *losses]


def count_layers(facts: AdapterFacts) -> str:
    """Return ``3 layers``, or ``1 layer``."""
    count = len(facts.layers)
    return f"{count} layer{'s' if count > 1 else ''}"


def as_ranges(numbers: list[int]) -> str:
    """Return ``0-3, 7`` for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def columns(facts: AdapterFacts) -> dict[str, list[str]]:
    """Return the layers' table: names of the columns, and their cells."""

    def by_side(name: str, field: str, form: str) -> dict[str, list[str]]:
        values = [getattr(layer, field) for layer in facts.layers]
        cells = {}
        for side in dict.fromkeys(side for value in values for side in value):
            column = [format(v[side], form) if side in v else "" for v in values]
            cells[f"{name} {side}"] = column
        return cells

    layers = facts.layers
    table = {
        "layer": [str(layer.layer) for layer in layers],
        "rank": [str(layer.rank) for layer in layers],
        "parameters": [f"{layer.parameters:,}" for layer in layers],
    }
    if facts.orthonormal is None:
        name = "R error" if facts.has_rotation else "W₂ error"
        table |= by_side(name, "orthogonality_error", ".1e")
    if layers[0].overlap is not None:
        table["overlap prefix/suffix"] = [f"{layer.overlap:.3f}" for layer in layers]
    table |= by_side("overlap with other,", "overlap_with", ".3f")
    return table | by_side("edit", "edit_size", ".3f")


def notes(facts: AdapterFacts) -> list[str]:
    """Explain the columns of the layers' table."""
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
