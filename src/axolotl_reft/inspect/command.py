"""``axolotl reft inspect``: read an adapter's files, probe it, print and plot."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from axolotl_reft.inspect.facts import AdapterFacts, inspect_adapter
from axolotl_reft.inspect.plot import figure
from axolotl_reft.inspect.probe import (
    add_sizes,
    load_model,
    open_base,
    probe,
    prompt_ids,
)
from axolotl_reft.inspect.text import print_facts

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def run(
    directory: str,
    *,
    prompts: Sequence[str] = (),
    prompts_file: str | None = None,
    sample: int | None = None,
    chat: bool = False,
    base_model: str | None = None,
    device: str = "cpu",
    other: str | None = None,
    plot: str | None = None,
    as_json: bool = False,
) -> None:
    """Inspect an adapter and print its facts; the base is loaded if there are prompts.

    Raises:
        ValueError: an option, the adapter or the base model cannot be used; nothing is
            printed or written then.
    """
    _check_output(plot, as_json)
    if sample and not prompts_file:
        raise ValueError("--sample: there is no file to draw from; pass --prompts-file")
    texts = list(prompts)
    if prompts_file:
        texts += read_prompts(prompts_file, sample)
    for option, value in (("--chat", chat), ("--base-model", base_model)):
        if value and not texts:
            raise ValueError(
                f"{option}: there is no prompt to run; pass --prompt or --prompts-file"
            )
    _check_device(device)
    facts = inspect_adapter(directory, other)
    probed, untemplated = [], False
    if texts:
        base_model, tokenizer = open_base(facts, base_model)
        ids = [prompt_ids(tokenizer, text, chat) for text in texts]
        untemplated = not all(_ends_like_template(facts, prompt) for prompt in ids)
        model = load_model(facts, base_model, device)
        probed = [probe(model, tokenizer, prompt) for prompt in ids]
        add_sizes(facts, probed)
    if plot:
        figure(facts, probed).savefig(plot, dpi=150)
    if as_json:
        found = facts.to_dict() | {"prompts": [prompt.to_dict() for prompt in probed]}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print_facts(facts, probed)
    if plot:
        # Standard output must stay valid JSON.
        print(f"wrote {plot}", file=sys.stderr if as_json else sys.stdout)
    if untemplated:
        print(
            "The adapter was trained with a chat template, and not all prompts are in "
            "it, so that other tokens are edited than in use. Add --chat.",
            file=sys.stderr,
        )


def read_prompts(path: str, sample: int | None = None, seed: int = 0) -> list[str]:
    """Read one prompt a line: plain text, a JSON string, or JSON with ``prompt``.

    Args:
        sample: how many to draw; None takes all.

    Raises:
        ValueError: the file cannot be read, is empty, or a line holds no prompt.
    """
    try:
        lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--prompts-file: {path!r} cannot be read: {error}; pass a text file"
        ) from error
    if not lines:
        raise ValueError(f"--prompts-file: {path!r} is empty; write one prompt a line")
    if sample and sample < len(lines):
        lines = random.Random(seed).sample(lines, sample)
    return [_prompt(line, path) for line in lines]


def _prompt(line: str, path: str) -> str:
    if line.lstrip()[0] not in '{"':
        return line
    try:
        prompt = json.loads(line)
    except ValueError:
        return line
    if isinstance(prompt, dict):
        prompt = prompt.get("prompt", prompt.get("instruction"))
    if not isinstance(prompt, str):
        raise ValueError(
            f"--prompts-file: {path!r} has a line without a prompt: {line[:60]!r}; "
            'write plain text, or JSON such as {"prompt": "…"}'
        )
    return prompt


def _ends_like_template(facts: AdapterFacts, ids: list[int]) -> bool:
    """Whether a prompt ends with the generation prompt that the adapter expects."""
    markers = facts.settings.get("turn_markers")
    return markers is None or any(
        ids[-len(marker) :] == marker for marker in markers["generation_prompts"]
    )


def _check_output(plot: str | None, as_json: bool) -> None:
    """Check that the packages are installed and that the plot can be written."""
    needed = [*([] if as_json else ["rich"]), *(["matplotlib"] if plot else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"inspect needs {' and '.join(missing)}, not installed here; run "
            "pip install 'axolotl-reft[inspect]'"
        )
    if plot is None:
        return
    target = Path(plot)
    if target.suffix.lower() not in PLOT_SUFFIXES:
        raise ValueError(
            f"--plot: {plot!r} does not end with one of {', '.join(PLOT_SUFFIXES)}; "
            "name for example inspect.png"
        )
    if not target.absolute().parent.is_dir():
        raise ValueError(
            f"--plot: there is no folder {str(target.parent)!r}; create it first"
        )


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device: {device!r} cannot be used: {str(error).splitlines()[0]}; leave "
            "it out for the CPU"
        ) from error
