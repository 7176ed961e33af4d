"""An inspected adapter as a picture: PNG, SVG or PDF, or a page of its own (HTML).

matplotlib is imported when a picture is asked for. Lines differ in shade, dash and
marker, and the map of sizes gets lighter with them, so that all can be read in grey.
"""

from __future__ import annotations

from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from axolotl_reft.inspection import WITHOUT_ROTATION, AdapterFacts
from axolotl_reft.inspection_text import (
    columns,
    notes,
    summary,
    training_lines,
)
from axolotl_reft.probe import ProbedPrompt

SUFFIXES = (".png", ".svg", ".pdf", ".html")
_LINES: dict[str, dict[str, Any]] = {
    "prefix": {"color": "#003f7f", "linestyle": "-", "marker": "o"},
    "suffix": {"color": "#e08214", "linestyle": "--", "marker": "s"},
    "both": {"color": "#222222", "linestyle": "-", "marker": "o"},
    "all": {"color": "#222222", "linestyle": "-", "marker": "o"},
}
# Tokens in the map of sizes: more would not be legible.
_MOST_TOKENS = 40


def check_picture(path: str) -> None:
    """See that a picture can be written there.

    Raises:
        ValueError: the name does not end with a known suffix, or its folder is missing.
    """
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"--plot: {path!r} does not end with one of {', '.join(SUFFIXES)}; name "
            "for example inspect.png or inspect.html"
        )
    if not target.absolute().parent.is_dir():
        raise ValueError(
            f"--plot: there is no folder {str(target.parent)!r}; create it first"
        )


def write_picture(path: str, facts: AdapterFacts, prompts: list[ProbedPrompt]) -> None:
    """Draw the facts, and the first prompt's edits, into a file by its suffix."""
    if Path(path).suffix.lower() == ".html":
        Path(path).write_text(_page(facts, prompts), encoding="utf-8")
    else:
        _figure(facts, prompts).savefig(path, dpi=150)


def _figure(facts: AdapterFacts, prompts: list[ProbedPrompt]) -> Any:
    from matplotlib.figure import Figure

    panels = [_draw_errors]
    if any(layer.overlap is not None or layer.overlap_with for layer in facts.layers):
        panels.insert(0, _draw_overlaps)
    if any(layer.edit_size for layer in facts.layers):
        panels.insert(0, _draw_sizes)
    heights = [2.4] * len(panels)
    if prompts:
        heights.append(1.2 + min(max(0.16 * len(facts.layers), 1.4), 5.5))
    figure = Figure(figsize=(8, sum(heights) + 0.7), layout="constrained")
    axes = figure.subplots(
        len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    settings = facts.settings
    figure.suptitle(
        f"{Path(facts.directory).name}: {settings['intervention']}, positions "
        f"{settings['positions']}, {len(facts.layers)} layers, "
        f"{facts.parameters:,} parameters",
        fontsize=11,
    )
    for axis, draw in zip(axes, panels, strict=False):
        draw(axis, facts)
        axis.set_xlabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.margins(x=0.02)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    if prompts:
        _draw_map(figure, axes[-1], facts, prompts[0])
    return figure


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


def _is_free(facts: AdapterFacts) -> bool:
    return facts.settings["intervention"] in WITHOUT_ROTATION


def _draw_sizes(axis: Any, facts: AdapterFacts) -> None:
    _lines(axis, facts, "edit_size", "")
    axis.set_title(
        "Size of the edit, mean over the prompts' edited tokens", fontsize=10
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
    name = "W₂" if _is_free(facts) else "R"
    what = "free, need not be 0" if _is_free(facts) else "float32 rounds at 1e-7"
    axis.set_title(f"Distance of {name} from orthonormal rows ({what})", fontsize=10)
    axis.set_ylabel(f"max |{name} {name}ᵀ − I|")
    axis.set_yscale("log")
    axis.set_ylim(*_decades(facts))
    _legend(axis)


def _decades(facts: AdapterFacts) -> tuple[float, float]:
    """Around the errors; where they should be 0, from rounding up to 1."""
    errors = [e for layer in facts.layers for e in layer.orthogonality_error.values()]
    least, most = max(min(errors), 1e-10), max(errors)
    if _is_free(facts):
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


_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .7rem; text-align: right; white-space: nowrap; }
thead th { border-bottom: 2px solid #444; vertical-align: bottom; }
tbody tr:nth-child(even) { background: #f4f4f4; }
.facts td { text-align: left; white-space: normal; }
.facts td:first-child { font-weight: 600;
  white-space: nowrap; } .facts tr { background: none !important; }
.scroll { overflow-x: auto; } svg { max-width: 100%; height: auto; }
.tokens { font-family: ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; border: 1px solid #ccc; padding: .6rem; line-height: 1.9; }
.prefix, .suffix, .all { border-radius: .2rem; padding: .1rem .15rem; margin: 0 1px; }
.prefix, .all { background: #cfe2f7; border-bottom: 3px solid #003f7f; }
.suffix { background: #fde0bd; border-bottom: 3px dashed #b35c00; }
"""


def _page(facts: AdapterFacts, prompts: list[ProbedPrompt]) -> str:
    title = f"LoReFT adapter {escape(Path(facts.directory).name)}"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_CSS}</style></head><body>",
        f"<h1>{title}</h1>",
        _facts_table(summary(facts)),
    ]
    if facts.training:
        parts += ["<h2>Training</h2>", _facts_table(training_lines(facts.training))]
    if prompts:
        parts.append("<h2>Which tokens are edited</h2>")
        parts.append(
            '<p>Edited: <span class="prefix">prefix</span> '
            '<span class="suffix">suffix</span>; point at a token for the size of its '
            "edit.</p>"
            if not facts.settings["positions"] == "all"
            else "<p>Every token is edited; point at one for the size of its edit.</p>"
        )
        parts += [_tokens(prompt) for prompt in prompts[:8]]
    svg = StringIO()
    _figure(facts, prompts).savefig(svg, format="svg")
    drawing = svg.getvalue()
    parts += ["<h2>By layer</h2>", drawing[drawing.index("<svg") :]]
    built = columns(facts)
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in built)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in zip(*(cells for _, cells in built), strict=True)
    )
    parts.append(
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    parts += [f"<p>{escape(line)}</p>" for line in notes(facts)]
    return "\n".join([*parts, "</body></html>", ""])


def _facts_table(lines: list[tuple[str, str]]) -> str:
    rows = (f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in lines)
    return f'<table class="facts">{"".join(rows)}</table>'


def _tokens(prompt: ProbedPrompt) -> str:
    spans = []
    for place, token in enumerate(prompt.tokens):
        text = escape(token.text)
        if token.edited:
            size = float(torch.nanmean(prompt.sizes_LT[:, place]))
            told = f"token {place}, {token.edited}, mean size over layers {size:.3f}"
            text = f'<span class="{token.edited}" title="{told}">{text}</span>'
        spans.append(text)
    return f'<div class="tokens">{"".join(spans)}</div>'
