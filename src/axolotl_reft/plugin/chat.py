"""Find the turn markers of the chat templates of a config's data."""

from __future__ import annotations

from axolotl.loaders import load_tokenizer
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

from axolotl_reft.prompts.templates import turn_markers

LOG = get_logger(__name__)


def markers_of_data(cfg: DictDefault) -> dict[str, list] | None:
    """Merge ``turn_markers`` of all chat data sets; None where there are none."""
    datasets = [
        dataset
        for dataset in [*(cfg.datasets or []), *(cfg.test_datasets or [])]
        if "chat_template" in str(dataset.get("type"))
    ]
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
                "%s. Training finds turns by the labels; at inference only answers of "
                "`generate` on a reused cache are known, and a whole conversation "
                "counts as one prompt",
                error,
            )
            continue
        prompts += [ids for ids in found["generation_prompts"] if ids not in prompts]
        ends.update(found["end_of_turn"])
    if not prompts:
        return None
    return {"generation_prompts": prompts, "end_of_turn": sorted(ends)}
