"""Draw an inspected adapter; matplotlib is imported when a plot is asked for.

Lines differ in shade, dash and marker, and the map of sizes in lightness, so that all
can be read in grey.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from axolotl_reft.inspect.facts import AdapterFacts
from axolotl_reft.inspect.probe import ProbedPrompt
from axolotl_reft.inspect.text import count_layers

_LINES: dict[str, dict[str, Any]] = {
    "prefix": {"color": "#003f7f", "linestyle": "-", "marker": "o"},
    "suffix": {"color": "#e08214", "linestyle": "--", "marker": "s"},
    "both": {"color": "#222222", "linestyle": "-", "marker": "o"},
    "all": {"color": "#222222", "linestyle": "-", "marker": "o"},
    "overlap": {"color": "#222222", "linestyle": "-.", "marker": "^"},
}
# More tokens in the map of sizes would not be legible.
_MOST_TOKENS = 40
_SIZE = "‖Φ(h)−h‖ / ‖h‖"


def figure(facts: AdapterFacts, prompts: list[ProbedPrompt]) -> Any:
    """Return matplotlib's figure: a panel for each quantity by layer, and a map of the
    first prompt's edits."""
    from matplotlib.figure import Figure

    layers = facts.layers
    panels: list[Any] = []
    if any(layer.edit_size for layer in layers):
        panels.append(_draw_sizes)
    if any(layer.overlap is not None or layer.overlap_with for layer in layers):
        panels.append(_draw_overlaps)
    # An orthonormal R is drawn only where there is nothing else to see.
    if facts.orthonormal is None or not panels:
        panels.append(_draw_errors)
    heights = [2.4] * len(panels)
    if prompts:
        heights.append(1.2 + min(max(0.16 * len(layers), 1.4), 5.5))
    drawing = Figure(figsize=(8, sum(heights) + 0.7), layout="constrained")
    axes = drawing.subplots(
        len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    settings = facts.settings
    drawing.suptitle(
        f"{Path(facts.directory).name}: {settings['intervention']}, positions "
        f"{settings['positions']}, {count_layers(facts)}, "
        f"{facts.all_parameters:,} parameters",
        fontsize=11,
    )
    for axis, draw in zip(axes, panels, strict=False):
        draw(axis, facts)
        axis.set_xlabel("layer")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.margins(x=0.02)
        if len(layers) == 1:
            axis.set_xlim(layers[0].layer - 1, layers[0].layer + 1)
            axis.set_xticks([layers[0].layer])
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend(fontsize=8, loc="upper right", ncols=2, framealpha=0.9)
    if prompts:
        _draw_map(axes[-1], facts, prompts[0])
    return drawing


def _line(axis: Any, values: dict[int, float], style: str, label: str) -> None:
    """Draw one quantity by layer."""
    size = 5 if len(values) <= 40 else 3
    line = _LINES[style] | {"markersize": size, "linewidth": 1.3}
    axis.plot(list(values), list(values.values()), label=label, **line)


def _lines_by_side(axis: Any, facts: AdapterFacts, field: str, prefix: str) -> None:
    """Draw a field of the layers, a line for each side."""
    by_layer = {layer.layer: getattr(layer, field) for layer in facts.layers}
    for side in dict.fromkeys(side for values in by_layer.values() for side in values):
        values = {at: sizes[side] for at, sizes in by_layer.items() if side in sizes}
        name = "prefix and suffix" if side == "both" else side
        _line(axis, values, side, f"{prefix}{name}")


def _draw_sizes(axis: Any, facts: AdapterFacts) -> None:
    _lines_by_side(axis, facts, "edit_size", "")
    axis.set_title(
        "Size of the edit, mean over the prompts' edited tokens (1: as large as the "
        "hidden state)",
        fontsize=10,
    )
    axis.set_ylabel(_SIZE)
    # Room for the legend above the lines.
    axis.set_ylim(0, 1.35 * max(s for x in facts.layers for s in x.edit_size.values()))


def _draw_overlaps(axis: Any, facts: AdapterFacts) -> None:
    overlaps = {x.layer: x.overlap for x in facts.layers if x.overlap is not None}
    if overlaps:
        _line(axis, overlaps, "overlap", "prefix and suffix")
    _lines_by_side(axis, facts, "overlap_with", "with other: ")
    axis.axhline(facts.chance, color="#666666", linestyle=":", label="by chance")
    other = f" (other: {Path(facts.other).name})" if facts.other else ""
    axis.set_title(f"Overlap of the subspaces written to{other}", fontsize=10)
    axis.set_ylabel("0 orthogonal, 1 same")
    axis.set_ylim(0, 1.05)


def _draw_errors(axis: Any, facts: AdapterFacts) -> None:
    _lines_by_side(axis, facts, "orthogonality_error", "")
    name = "R" if facts.has_rotation else "W₂"
    what = "should be 0" if facts.has_rotation else "free, need not be 0"
    axis.set_title(f"Distance of {name} from orthonormal rows ({what})", fontsize=10)
    axis.set_ylabel(f"max |{name} {name}ᵀ − I|")
    errors = [e for layer in facts.layers for e in layer.orthogonality_error.values()]
    least, most = max(min(errors), 1e-10), max(errors)
    axis.set_yscale("log")
    if facts.has_rotation:  # from rounding up to 1
        axis.set_ylim(min(1e-9, least / 2), max(1.0, most * 2))
    else:
        axis.set_ylim(least / 3, most * 10)


def _draw_map(axis: Any, facts: AdapterFacts, prompt: ProbedPrompt) -> None:
    """Draw the size of each token's edit in each layer, without tokens not edited."""
    places = [at for at, token in enumerate(prompt.tokens) if token.edited]
    half = _MOST_TOKENS // 2
    shown = places if len(places) <= _MOST_TOKENS else places[:half] + places[-half:]
    sizes_LN = prompt.sizes_LT[:, shown]
    top = float(sizes_LN[~torch.isnan(sizes_LN)].max()) if shown else 1.0
    image = axis.imshow(
        sizes_LN.numpy(),
        aspect="auto",
        origin="lower",
        cmap="cividis",
        vmin=0,
        vmax=top,
    )
    axis.set_xticks(
        range(len(shown)),
        [_label(prompt.tokens[at].text, at) for at in shown],
        rotation=90,
        fontsize=7 if len(shown) <= 24 else 6,
        family="monospace",
    )
    numbers = [layer.layer for layer in facts.layers]
    every = -(-len(numbers) // 16)
    axis.set_yticks(range(0, len(numbers), every), numbers[::every], fontsize=8)
    pairs = enumerate(zip(shown, shown[1:], strict=False))
    gaps = [at for at, (left, right) in pairs if right > left + 1]
    for at in gaps:
        axis.axvline(at + 0.5, color="white", linewidth=3)
    left_out = len(places) - len(shown)
    between = f"{left_out} more, not shown" if left_out else "tokens not edited"
    axis.set_title(
        f"Size of the edit in the first prompt ({len(prompt.tokens)} tokens, "
        f"{len(places)} edited)",
        fontsize=10,
    )
    axis.set_ylabel("layer")
    axis.set_xlabel(
        "edited token and its place in the prompt"
        + (f" (at the white line: {between})" if gaps else "")
    )
    axis.figure.colorbar(image, ax=axis, label=_SIZE)


def _label(text: str, place: int) -> str:
    text = (text.strip() or "␣").replace("$", r"\$")
    return f"{text if len(text) <= 14 else text[:13] + '…'} {place}"
