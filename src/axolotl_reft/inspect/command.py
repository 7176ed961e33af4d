"""``axolotl reft inspect``, apart from its options."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch

from axolotl_reft.inspect.facts import AdapterFacts, inspect_adapter
from axolotl_reft.inspect.page import check_picture, write_picture
from axolotl_reft.inspect.probe import (
    add_sizes,
    load_model,
    open_base,
    probe,
    prompt_ids,
    read_prompts,
    sampled_prompts,
)
from axolotl_reft.inspect.text import print_facts

# Written by the base model where none is given.
_SAMPLED = 8


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
    """Inspect an adapter and print what was found.

    Raises:
        ValueError: an option, the adapter or the base model cannot be used; nothing is
            printed or written then.
    """
    if plot:
        check_picture(plot)
    texts = list(prompts)
    if prompts_file:
        texts += read_prompts(prompts_file, sample)
    if chat and not texts:
        raise ValueError(
            "--chat: there is no prompt to put into the template; pass --prompt"
        )
    _check_device(device)
    facts = inspect_adapter(directory, other)
    probed, untemplated = [], False
    if texts or sample or base_model:
        base_model, tokenizer = open_base(facts, base_model)
        ids = [prompt_ids(tokenizer, text, chat) for text in texts]
        untemplated = not all(_asks(facts, one) for one in ids)
        model = load_model(facts, base_model, device)
        if not ids:
            ids = sampled_prompts(model, tokenizer, sample or _SAMPLED)
        probed = [probe(model, tokenizer, one) for one in ids]
        add_sizes(facts, probed)
    if plot:
        write_picture(plot, facts, probed)
    if as_json:
        found = facts.to_dict() | {"prompts": [prompt.to_dict() for prompt in probed]}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print_facts(facts, probed)
    if plot:
        # Standard output is JSON's alone.
        print(f"wrote {plot}", file=sys.stderr if as_json else sys.stdout)
    if untemplated:
        print(
            "The adapter was trained with a chat template, and not all prompts are in "
            "it, so that other tokens are edited than in use. Add --chat.",
            file=sys.stderr,
        )


def _asks(facts: AdapterFacts, ids: list[int]) -> bool:
    """Whether a prompt ends as those of the adapter's chat template, if it has one."""
    marks = facts.settings.get("turn_markers")
    if marks is None:
        return True
    return any(ids[-len(mark) :] == mark for mark in marks["generation_prompts"])


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device: {device!r} cannot be used: {str(error).splitlines()[0]}; leave "
            "it out for the CPU"
        ) from error
