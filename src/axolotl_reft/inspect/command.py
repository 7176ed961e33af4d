"""``axolotl reft inspect``: read an adapter's files, probe it, print and plot."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from axolotl_reft.inspect import probe
from axolotl_reft.inspect.facts import inspect_adapter

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
    ValueError if an option, the adapter or the base cannot be used."""
    check_output("inspect", plot, as_json)
    has_prompts = prompts or prompts_file
    no_prompt = "there is no prompt to run; pass --prompt or --prompts-file"
    for is_wrong, message in (
        (chat and not has_prompts, f"--chat: {no_prompt}"),
        (base_model and not has_prompts, f"--base-model: {no_prompt}"),
        (sample and not prompts_file, "--sample: pass a file with --prompts-file"),
    ):
        if is_wrong:
            raise ValueError(message)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: {device!r} cannot be used: {reason}") from error
    texts = list(prompts)
    if prompts_file:
        texts += read_prompts(prompts_file, sample)
    facts = inspect_adapter(directory, other)
    probed: list[probe.ProbedPrompt] = []
    if texts:
        base_model, tokenizer = probe.resolve_base(facts, base_model)
        ids = [probe.prompt_ids(tokenizer, text, chat) for text in texts]
        model = probe.load_model(facts, base_model, device)
        probed = [probe.probe(model, tokenizer, prompt) for prompt in ids]
        probe.add_sizes(facts, probed)
        markers = facts.settings.get("turn_markers") or {"generation_prompts": [[]]}
        ends = markers["generation_prompts"]
        if not all(any(p[len(p) - len(end) :] == end for end in ends) for p in ids):
            print(
                "Some prompts do not end with the generation prompt of the adapter's "
                "chat template: other tokens are edited than in training. Add --chat.",
                file=sys.stderr,
            )
    if plot:
        from axolotl_reft.inspect.plot import figure

        figure(facts, probed).savefig(plot, dpi=150)
    if as_json:
        found = asdict(facts) | {"prompts": [prompt.to_dict() for prompt in probed]}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        from axolotl_reft.inspect.text import print_facts

        print_facts(facts, probed)
    if plot:
        # Standard output must stay valid JSON.
        print(f"wrote {plot}", file=sys.stderr if as_json else sys.stdout)


def check_output(command: str, plot: str | None, as_json: bool) -> None:
    """Raise ValueError if a command's results cannot be printed or drawn."""
    folder = Path(plot or "").absolute().parent
    missing = "is not installed; run pip install 'axolotl-reft[inspect]'"
    for is_wrong, message in (
        (not as_json and find_spec("rich") is None, f"{command}: rich {missing}"),
        (plot and find_spec("matplotlib") is None, f"--plot: matplotlib {missing}"),
        (
            plot and not plot.lower().endswith(PLOT_SUFFIXES),
            f"--plot: {plot!r} does not end with one of {', '.join(PLOT_SUFFIXES)}",
        ),
        (plot and not folder.is_dir(), f"--plot: there is no folder {str(folder)!r}"),
    ):
        if is_wrong:
            raise ValueError(message)


def read_prompts(path: str, sample: int | None = None, seed: int = 0) -> list[str]:
    """Read one prompt a line, or so many of them: text, a JSON string, or an object;
    ValueError if the file cannot be read, is empty, or a line holds no whole prompt."""
    try:
        lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts-file: {path!r} cannot be read: {error}") from error
    if not lines:
        raise ValueError(f"--prompts-file: {path!r} is empty; write one prompt a line")
    if sample and sample < len(lines):
        lines = random.Random(seed).sample(lines, sample)
    prompts = []
    for line in lines:
        prompt: object = line
        if line.lstrip()[0] in '{"':
            with suppress(ValueError):
                prompt = json.loads(line)
        if isinstance(prompt, dict):
            if "prompt" not in prompt and prompt.get("input"):
                raise ValueError(
                    f"--prompts-file: {path!r} has an instruction with an input, which "
                    "a data type's template would join; write the whole prompt, as in "
                    f'training, as JSON such as {{"prompt": "…"}}; got {line[:60]!r}'
                )
            prompt = prompt.get("prompt", prompt.get("instruction"))
        if not isinstance(prompt, str):
            raise ValueError(
                f"--prompts-file: {path!r} has a line without a prompt: {line[:60]!r}; "
                'write plain text, or JSON such as {"prompt": "…"}'
            )
        prompts.append(prompt)
    return prompts
