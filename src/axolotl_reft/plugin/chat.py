"""Find the turn markers of the chat templates of a config's data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from axolotl.loaders import load_tokenizer
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.logging import get_logger

from axolotl_reft.prompts.templates import turn_markers

LOG = get_logger(__name__)


def markers_of_data(cfg: Any) -> dict[str, list] | None:
    """Merge ``turn_markers`` of all chat data sets; None where there are none."""
    datasets = list(_chat_datasets(cfg))
    if not datasets:
        return None
    tokenizer = load_tokenizer(cfg)
    prompts: list[list[int]] = []
    ends: set[int] = set()
    for dataset in datasets:
        template = get_chat_template_from_config(cfg, dataset, tokenizer)
        options = dataset.get("chat_template_kwargs") or cfg.chat_template_kwargs or {}
        try:
            found = turn_markers(tokenizer, template, **options)
        except ValueError as error:
            LOG.warning(
                "%s. In training the labels tell its turns; at inference only what "
                "`generate` answered itself on a reused cache is known, and a whole "
                "conversation handed to it counts as one prompt",
                error,
            )
            continue
        prompts += [ids for ids in found["generation_prompts"] if ids not in prompts]
        ends.update(found["end_of_turn"])
    if not prompts:
        return None
    return {"generation_prompts": prompts, "end_of_turn": sorted(ends)}


def _chat_datasets(cfg: Any) -> Iterator[Any]:
    for name in ("datasets", "test_datasets"):
        for dataset in cfg.get(name) or []:
            if "chat_template" in str(dataset.get("type")):
                yield dataset
