"""An inspected adapter as a file: PNG, SVG or PDF, or a page of its own (HTML)."""

from __future__ import annotations

from html import escape
from io import StringIO
from pathlib import Path

import torch

from axolotl_reft.inspect.facts import AdapterFacts
from axolotl_reft.inspect.plot import figure
from axolotl_reft.inspect.probe import ProbedPrompt
from axolotl_reft.inspect.text import columns, notes, summary, training_lines

SUFFIXES = (".png", ".svg", ".pdf", ".html")


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
        figure(facts, prompts).savefig(path, dpi=150)


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
    parts.append("<h2>By layer</h2>")
    svg = StringIO()
    figure(facts, prompts).savefig(svg, format="svg")
    parts.append(svg.getvalue()[svg.getvalue().index("<svg") :])
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
