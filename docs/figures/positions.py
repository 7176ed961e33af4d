"""Draw which tokens are edited, with the package's own rules: docs/figures/*.png.

python docs/figures/positions.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.patches import Patch, Rectangle

from axolotl_reft.prompts.positions import Positions
from axolotl_reft.prompts.spans import prompt_spans

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
KINDS = {
    "prefix, edited": ("#2b6cb0", "white"),
    "suffix, edited": ("#dd8a1d", "black"),
    "prompt, not edited": ("#dbe7f3", "black"),
    "answer, trained or generated": ("#e3e3e3", "black"),
    "padding": ("white", "#999999"),
}


@dataclass
class Row:
    """A row of a batch, drawn as text: p prompt, a answer, ' ' padding, | a sample."""

    title: str
    drawn: str
    positions: str = "f2+l2"
    every: bool = True


def kinds(row: Row) -> list[tuple[str, str, bool]]:
    """Of every token: its letter, its kind, and whether a sample begins with it."""
    begins, letters = [], ""
    for number, part in enumerate(row.drawn.split("|")):
        letters += part
        begins += [bool(number) and not at for at in range(len(part))]
    real = torch.tensor([[letter != " " for letter in letters]])
    answer = torch.tensor([[letter == "a" for letter in letters]])
    starts = torch.tensor([begins])
    starts[0, 0] = True
    spans = prompt_spans(real, starts, answer, row.every)
    prefix, suffix = spans.edited(Positions.parse(row.positions))
    names = []
    for at, letter in enumerate(letters):
        if prefix[0, at]:
            kind = "prefix, edited"
        elif suffix[0, at]:
            kind = "suffix, edited"
        elif letter == " ":
            kind = "padding"
        elif letter == "a":
            kind = "answer, trained or generated"
        else:
            kind = "prompt, not edited"
        names.append((letter, kind, begins[at]))
    return names


def draw(rows: list[Row], name: str) -> None:
    width = max(len(row.drawn.replace("|", "")) for row in rows)
    figure, axes = plt.subplots(figsize=(9, 0.62 * len(rows) + 0.7), dpi=110)
    for number, row in enumerate(rows):
        y = -number
        for at, (letter, kind, begins) in enumerate(kinds(row)):
            face, ink = KINDS[kind]
            axes.add_patch(
                Rectangle((at, y), 0.94, 0.72, facecolor=face, edgecolor="#888888")
            )
            text = {"p": "p", "a": "a", " ": "·"}[letter]
            axes.text(at + 0.47, y + 0.36, text, ha="center", va="center", color=ink)
            if begins:
                axes.plot([at - 0.03] * 2, [y - 0.12, y + 0.84], color="black", lw=2)
        axes.text(-0.4, y + 0.36, row.title, ha="right", va="center")
    axes.set_xlim(-9.5, width + 0.1)
    axes.set_ylim(-len(rows) - 0.75, 1)
    axes.axis("off")
    shown = {kind for row in rows for _, kind, _ in kinds(row)}
    patches = [
        Patch(facecolor=face, edgecolor="#888888", label=kind)
        for kind, (face, _) in KINDS.items()
        if kind in shown
    ]
    axes.legend(
        handles=patches, loc="lower center", ncols=len(patches), frameon=False,
        fontsize=8, handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip
    figure.tight_layout(pad=0.3)
    figure.savefig(HERE / f"{name}.png")
    plt.close(figure)


FIGURES = {
    "settings": [
        Row(f"positions: {text}", "ppppppppppaaaa", text)
        for text in ("f2", "l3", "f2+l3", "l1")
    ],
    "short": [
        Row(f"prompt of {count}, f3+l3", "p" * count + "aaa", "f3+l3")
        for count in (8, 6, 5, 3, 1)
    ],
    "batches": [
        Row("alone", "pppppppaaa"),
        Row("padded right", "pppppppaaa    "),
        Row("padded left", "    pppppppaaa"),
        Row("packed with others", "pppppaa|pppppppaaa|ppppa"),
    ],
    "chat": [
        Row("turns: every", "ppppppaaapppppaaaapppppp"),
        Row("turns: first", "ppppppaaapppppaaaapppppp", every=False),
    ],
}


if __name__ == "__main__":
    for name, rows in FIGURES.items():
        draw(rows, name)
