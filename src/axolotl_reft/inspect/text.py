"""Print an adapter's facts as tables: styled in a terminal, plain where piped."""

from __future__ import annotations

from itertools import groupby

from rich import box, filesize
from rich.console import Console
from rich.table import Table
from rich.text import Text

from axolotl_reft.inspect.facts import AdapterFacts
from axolotl_reft.inspect.probe import ProbedPrompt
from axolotl_reft.inspect.tokens import legend, runs

_STYLES = {"": "", "prefix": "bold cyan", "suffix": "bold yellow", "all": "bold cyan"}
# Wide enough that nothing wraps where there is no terminal.
_PIPED_WIDTH = 200
_MAX_PROMPTS = 3


def print_facts(facts: AdapterFacts, prompts: list[ProbedPrompt]) -> None:
    """Print settings, layers and the first prompts."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    grid = Table.grid(padding=(0, 2))
    for name, value in summary(facts):
        grid.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    table = Table(box=box.SIMPLE, pad_edge=False)
    by_name = columns(facts)
    for name in by_name:
        table.add_column(name, justify="right")
    for row in zip(*by_name.values(), strict=True):
        table.add_row(*row)
    notes = [quantity.title for quantity in facts.quantities()]
    if facts.orthonormal is not None:
        error = f"max |R Rᵀ − I| is {facts.orthonormal:.1e}"
        notes.append(f"R: its rows are orthonormal in every layer ({error})")
    console.print(grid, table, *notes, sep="\n")
    shown = prompts[:_MAX_PROMPTS]
    for number, prompt in enumerate(shown, 1):
        edited = sum(token.edited is not None for token in prompt.tokens)
        console.print(
            f"\nprompt {number}: {len(prompt.tokens)} tokens, {edited} edited"
        )
        pieces = ((text, _STYLES[side]) for side, text in runs(prompt.tokens))
        console.print(Text.assemble(*pieces))
    signs = legend(token for prompt in shown for token in prompt.tokens)
    if signs:
        console.print(f"\nedited: {signs}")


def summary(facts: AdapterFacts) -> list[tuple[str, str]]:
    """Return names and values of what the adapter is and how it was trained."""
    settings, training, whole = facts.settings, facts.training, facts.trained_whole
    positions, parameters = settings["positions"], f"{facts.parameters:,}"
    if "+" in positions:
        each = "for both" if settings["tied_weights"] else "each"
        positions += f", one intervention {each}"
    if facts.all_parameters != facts.parameters:
        parameters += f" of LoReFT, {facts.all_parameters:,} in all"
    lora = facts.lora_parameters
    version, epochs = settings.get("axolotl_reft_version"), training.get("epochs") or 0
    count = f"{sum(whole.values()):,} parameters"
    layers = as_ranges([layer.layer for layer in facts.layers])
    lines = [
        ("adapter", facts.directory),
        ("method", f"{settings['peft_type']}, {settings['intervention']}"),
        ("base model", settings.get("base_model_name_or_path", "not named")),
        ("layers", f"{layers} ({facts.layer_count})"),
        ("component", f"{settings['component']}, {facts.size} wide"),
        ("positions", positions),
        ("rank", ", ".join(map(str, sorted({layer.rank for layer in facts.layers})))),
        ("parameters", parameters),
        ("size", filesize.decimal(facts.bytes)),
        ("LoRA beside it", lora and f"{lora:,} parameters"),
        ("dropout", settings["dropout"]),
        ("activation", settings.get("act_fn")),
        ("also saved", whole and f"{', '.join(whole)} (trained whole): {count}"),
        ("also saved", ", ".join(f"{name} (not trained)" for name in facts.also_saved)),
        ("saved by", version and f"axolotl-reft {version}"),
        ("trained", training and f"{training['steps']} steps, {epochs:.3g} epochs"),
    ]
    for key in ("loss", "eval_loss"):
        if f"last_{key}" in training:
            first, last = training[f"first_{key}"], training[f"last_{key}"]
            lines.append((key, f"{first:.4g} first, {last:.4g} last"))
    return [(name, str(value)) for name, value in lines if value]


def as_ranges(numbers: list[int]) -> str:
    """Return ``0-3, 7`` for [0, 1, 2, 3, 7]."""
    ranges = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        ranges.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return ", ".join(ranges)


def columns(facts: AdapterFacts) -> dict[str, list[str]]:
    """Return the layers' table: names of the columns, and their cells."""
    layers = facts.layers
    table = {
        "layer": [str(layer.layer) for layer in layers],
        "rank": [str(layer.rank) for layer in layers],
        "parameters": [f"{layer.parameters:,}" for layer in layers],
    }
    for quantity in facts.quantities():
        for label, values in quantity.lines.items():
            table[f"{quantity.name} {label}"] = [
                f"{values[layer.layer]:#.3g}" if layer.layer in values else ""
                for layer in layers
            ]
    return table
