"""An inspected adapter as a picture.

matplotlib is imported when a picture is asked for. Lines differ in shade, dash and
marker, and the map of sizes gets lighter with them, so that all can be read in grey.
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
}
# Tokens in the map of sizes: more would not be legible.
_MOST_TOKENS = 40


def figure(facts: AdapterFacts, prompts: list[ProbedPrompt]) -> Any:
    """matplotlib's figure: a panel for each quantity by layer, and one with the first
    prompt's edits."""
    from matplotlib.figure import Figure

    panels: list[Any] = []
    if any(layer.overlap is not None or layer.overlap_with for layer in facts.layers):
        panels.append(_draw_overlaps)
    if any(layer.edit_size for layer in facts.layers):
        panels.insert(0, _draw_sizes)
    # Of an R that is orthonormal, where there is nothing else to see.
    if facts.orthonormal is None or not panels:
        panels.append(_draw_errors)
    heights = [2.4] * len(panels)
    if prompts:
        heights.append(1.2 + min(max(0.16 * len(facts.layers), 1.4), 5.5))
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
        _number_layers(axis, facts)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    if prompts:
        _draw_map(drawing, axes[-1], facts, prompts[0])
    return drawing


def _number_layers(axis: Any, facts: AdapterFacts) -> None:
    if len(facts.layers) == 1:
        layer = facts.layers[0].layer
        axis.set_xlim(layer - 1, layer + 1)
        axis.set_xticks([layer])
    else:
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.margins(x=0.02)


def _lines(axis: Any, facts: AdapterFacts, field: str, name: str) -> None:
    sides = dict.fromkeys(s for layer in facts.layers for s in getattr(layer, field))
    for side in sides:
        points = [
            (layer.layer, getattr(layer, field)[side])
            for layer in facts.layers
            if side in getattr(layer, field)
        ]
        label = f"{name}{'prefix and suffix' if side == 'both' else side}"
        axis.plot(*zip(*points, strict=True), label=label, **_style(side, len(points)))


def _style(side: str, points: int) -> dict[str, Any]:
    size = 5 if points <= 40 else 3
    return _LINES[side] | {"markersize": size, "linewidth": 1.3}


def _legend(axis: Any) -> None:
    if len(axis.get_legend_handles_labels()[0]) > 1:
        axis.legend(fontsize=8, loc="upper right", ncols=2, framealpha=0.9)


def _draw_sizes(axis: Any, facts: AdapterFacts) -> None:
    _lines(axis, facts, "edit_size", "")
    axis.set_title(
        "Size of the edit, mean over the prompts' edited tokens (1: as large as the "
        "hidden state)",
        fontsize=10,
    )
    axis.set_ylabel("‖Φ(h)−h‖ / ‖h‖")
    # Room for the legend above the lines.
    axis.set_ylim(0, 1.35 * max(s for x in facts.layers for s in x.edit_size.values()))
    _legend(axis)


def _draw_overlaps(axis: Any, facts: AdapterFacts) -> None:
    own = [(x.layer, x.overlap) for x in facts.layers if x.overlap is not None]
    if own:
        axis.plot(
            *zip(*own, strict=True),
            label="prefix and suffix",
            **_style("both", len(own)) | {"marker": "^", "linestyle": "-."},
        )
    _lines(axis, facts, "overlap_with", "with other: ")
    axis.axhline(facts.chance, color="#666666", linestyle=":", label="by chance")
    title = "Overlap of the subspaces written to"
    if facts.other:
        title += f" (other: {Path(facts.other).name})"
    axis.set_title(title, fontsize=10)
    axis.set_ylabel("0 orthogonal, 1 same")
    axis.set_ylim(0, 1.05)
    _legend(axis)


def _draw_errors(axis: Any, facts: AdapterFacts) -> None:
    _lines(axis, facts, "orthogonality_error", "")
    name = "R" if facts.has_rotation else "W₂"
    what = "should be 0" if facts.has_rotation else "free, need not be 0"
    axis.set_title(f"Distance of {name} from orthonormal rows ({what})", fontsize=10)
    axis.set_ylabel(f"max |{name} {name}ᵀ − I|")
    axis.set_yscale("log")
    axis.set_ylim(*_decades(facts))
    _legend(axis)


def _decades(facts: AdapterFacts) -> tuple[float, float]:
    """Around the errors; where they should be 0, from rounding up to 1."""
    errors = [e for layer in facts.layers for e in layer.orthogonality_error.values()]
    least, most = max(min(errors), 1e-10), max(errors)
    if not facts.has_rotation:
        return least / 3, most * 10
    return min(1e-9, least / 2), max(1.0, most * 2)


def _draw_map(
    figure: Any, axis: Any, facts: AdapterFacts, prompt: ProbedPrompt
) -> None:
    places = [at for at, token in enumerate(prompt.tokens) if token.edited]
    shown = places
    if len(places) > _MOST_TOKENS:
        half = _MOST_TOKENS // 2
        shown = places[:half] + places[-half:]
    sizes = prompt.sizes_LT[:, shown]
    top = float(sizes[~torch.isnan(sizes)].max()) if shown else 1.0
    image = axis.imshow(
        sizes.numpy(), aspect="auto", origin="lower", cmap="cividis", vmin=0, vmax=top
    )
    axis.set_xticks(
        range(len(shown)),
        [_label(prompt.tokens[at].text, at) for at in shown],
        rotation=90,
        fontsize=7 if len(shown) <= 24 else 6,
        family="monospace",
    )
    every = -(-len(facts.layers) // 16)
    axis.set_yticks(
        range(0, len(facts.layers), every),
        [layer.layer for layer in facts.layers[::every]],
        fontsize=8,
    )
    for before, (left, right) in enumerate(zip(shown, shown[1:], strict=False)):
        if right > left + 1:
            axis.axvline(before + 0.5, color="white", linewidth=3)
    left_out = len(places) - len(shown)
    axis.set_title(
        f"Size of the edit in the first prompt ({len(prompt.tokens)} tokens, "
        f"{len(places)} edited)",
        fontsize=10,
    )
    axis.set_ylabel("layer")
    between = f"{left_out} more, not shown" if left_out else "tokens not edited"
    gaps = any(b > a + 1 for a, b in zip(shown, shown[1:], strict=False))
    axis.set_xlabel(
        "edited token and its place in the prompt"
        + (f" (at the white line: {between})" if gaps else "")
    )
    figure.colorbar(image, ax=axis, label="‖Φ(h)−h‖ / ‖h‖")


def _label(text: str, place: int) -> str:
    text = (text.strip() or "␣").replace("$", r"\$")
    return f"{text if len(text) <= 14 else text[:13] + '…'} {place}"
