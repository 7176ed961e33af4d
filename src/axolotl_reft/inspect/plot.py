"""Draw an inspected adapter.

Lines differ in shade, dash and marker, and the map of sizes in lightness, so that all
can be read in grey.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from axolotl_reft.inspect.facts import AdapterFacts
from axolotl_reft.inspect.probe import ProbedPrompt

_LINES = {
    "color": ["#003f7f", "#e08214", "#222222"],
    "linestyle": ["-", "--", "-."],
    "marker": ["o", "s", "^"],
}
# More would not be legible.
_MAX_TOKENS, _MAX_TICKS = 40, 16


def figure(facts: AdapterFacts, prompts: list[ProbedPrompt]) -> Figure:
    """Draw a panel for each quantity by layer, and a map of the first prompt."""
    panels = facts.quantities()
    heights = [2.4] * len(panels)
    if prompts:
        heights.append(1.2 + min(max(0.16 * len(facts.layers), 1.4), 5.5))
    drawing = Figure(figsize=(8, sum(heights) + 0.7), layout="constrained")
    axes = drawing.subplots(len(heights), squeeze=False, height_ratios=heights)
    settings = facts.settings
    drawing.suptitle(
        f"{Path(facts.directory).name}: {settings['intervention']}, positions "
        f"{settings['positions']}, {facts.layer_count}, "
        f"{facts.all_parameters:,} parameters"
    )
    numbers = [layer.layer for layer in facts.layers]
    every = -(-len(numbers) // _MAX_TICKS)
    for axis, panel in zip(axes.flat, panels, strict=False):
        axis.set_prop_cycle(**_LINES)
        for label, values in panel.lines.items():
            axis.plot(list(values), list(values.values()), label=label, markersize=4)
        if panel.name == "overlap":
            axis.axhline(facts.chance, color="#666666", linestyle=":")
        if len(panel.lines) > 1:
            axis.legend(ncols=2, fontsize=8)
        axis.set_title(panel.title, fontsize=10)
        axis.set(ylabel=panel.name, ylim=panel.limits)
        axis.set(xlabel="layer", xlim=(numbers[0] - 1, numbers[-1] + 1))
        axis.set_yscale("log" if panel.limits[0] else "linear")
        axis.set_xticks(numbers[::every])
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    if prompts:
        axis = axes.flat[-1]
        axis.set_yticks(range(0, len(numbers), every), numbers[::every], fontsize=8)
        _draw_map(axis, prompts[0])
    return drawing


def _draw_map(axis: Axes, prompt: ProbedPrompt) -> None:
    """Draw the size of each token's edit in each layer, without tokens not edited."""
    places = [at for at, token in enumerate(prompt.tokens) if token.edited]
    half = _MAX_TOKENS // 2
    shown = places if len(places) <= _MAX_TOKENS else places[:half] + places[-half:]
    labels = [f"{prompt.tokens[at].text.strip()[:14] or '␣'} {at}" for at in shown]
    sizes = prompt.sizes_LT[:, shown].numpy()
    image = axis.imshow(sizes, aspect="auto", origin="lower", cmap="cividis", vmin=0)
    axis.set_xticks(
        range(len(shown)), labels, rotation=90, fontsize=6, parse_math=False
    )
    left_out = len(places) - len(shown)
    axis.set_title(
        f"Size of the edit in the first prompt ({len(prompt.tokens)} tokens, "
        f"{len(places)} edited{f', {left_out} not shown' if left_out else ''})",
        fontsize=10,
    )
    axis.set(xlabel="edited token and its place in the prompt", ylabel="layer")
    axis.figure.colorbar(image, ax=axis, label="edit")
