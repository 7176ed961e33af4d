"""Prompts as the config's data sets form them: turn markers, and what inference lacks.

``axolotl inference`` puts the training's text around a typed prompt only where
``--prompter`` or a chat template asks for it; else the adapter edits other tokens.
"""

from __future__ import annotations

import sys
from typing import Any

from axolotl import prompters
from axolotl.cli.utils import resolve_chat_template_str
from axolotl.loaders import load_tokenizer
from axolotl.prompt_strategies import load
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.data.wrappers import DATASET_HANDLERS
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from datasets import Dataset

from axolotl_reft.prompts.templates import find_markers

LOG = get_logger(__name__)

_TYPED = "{instruction}"


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
            found, unmarked = find_markers(tokenizer, template, **options)
        except ValueError as error:
            LOG.warning(
                "%s. Training finds turns by the labels; at inference only answers of "
                "`generate` on a reused cache are known, and a whole conversation "
                "counts as one prompt",
                error,
            )
            continue
        if unmarked:
            LOG.info(
                "the chat template's turn markers do not find the answers of %s; "
                "training stops where the data has them trained",
                ", ".join(unmarked),
            )
        prompts += [ids for ids in found["generation_prompts"] if ids not in prompts]
        ends.update(found["end_of_turn"])
    if not prompts:
        return None
    return {"generation_prompts": prompts, "end_of_turn": sorted(ends)}


def warn_of_other_prompts(cfg: DictDefault, chat: bool) -> None:
    """Warn where typed prompts, ``--chat`` or not, differ from the first data set's."""
    has_prompter = any(option.startswith("--prompter") for option in sys.argv)
    if has_prompter or not cfg.datasets or cfg.reward_model:
        return
    dataset, tokenizer = cfg.datasets[0], load_tokenizer(cfg)
    template = resolve_chat_template_str(cfg, tokenizer)
    if chat:
        template = template or tokenizer.chat_template
    form = remedy = None
    if "chat_template" in str(dataset.type):
        if template != get_chat_template_from_config(cfg, dataset, tokenizer):
            name = dataset.chat_template or "tokenizer_default"
            form = "the chat template of the first data set"
            remedy = f"Write chat_template: {name} at the top of the config"
            if name == "jinja":
                remedy += ", with its chat_template_jinja"
    elif not cfg.rl:
        try:
            trained = _trained_prompt(cfg, dataset, tokenizer)
        except Exception as error:  # any strategy's; a hint must not stop inference
            LOG.debug("the form of the first data set's prompts: %s", error)
            return
        # Compared as ids: a tokenizer may drop the difference.
        if trained and (
            template or tokenizer(_TYPED).input_ids != tokenizer(trained).input_ids
        ):
            form, remedy = f"the form {trained!r}", _remedy(cfg, trained)
    if form:
        LOG.warning(
            "training put prompts into %s, and axolotl inference does not: the adapter "
            "edits other tokens. %s",
            form,
            remedy,
        )


def tell_of_sampling(chat: bool) -> None:
    """Tell that axolotl does not give the likeliest answer, and how to have it."""
    remedy = "call generate(..., do_sample=False) in Python"
    if chat:
        remedy = "type /set temperature 0 and /set repetition_penalty 1"
    LOG.info(
        "axolotl samples answers, and makes words of the prompt less likely (a "
        "repetition penalty of 1.1); for the most likely answer, %s",
        remedy,
    )


def _trained_prompt(cfg: DictDefault, dataset: DictDefault, tokenizer: Any) -> str:
    """Return a prompt in training, with ``_TYPED`` for its instruction, or ""."""
    kind, system, prompter = dataset.type, "", None
    if isinstance(kind, dict):
        system = kind.get("system_prompt") or ""
        prompter = load("user_defined", tokenizer, cfg, dict(kind)).prompter
    elif kind and (strategy := load(kind, tokenizer, cfg, dataset)):
        prompter = getattr(strategy, "prompter", None)
    elif kind:
        name, _, style = kind.partition(":")
        if handler := DATASET_HANDLERS.get(name):
            row = Dataset.from_dict({"": [""]}).to_iterable_dataset()  # never read
            _, prompter = handler(style or None, tokenizer, cfg, row, {})
    if not isinstance(prompter, prompters.AlpacaPrompter):
        return ""
    if hasattr(prompter, "build_prompt_w_system"):
        return next(prompter.build_prompt_w_system(system, _TYPED))
    return next(prompter.build_prompt(_TYPED))


def _remedy(cfg: DictDefault, trained: str) -> str:
    command = f"axolotl inference {cfg.axolotl_config_path}"
    gradio = " --gradio" if "--gradio" in sys.argv else ""
    for name, found in vars(prompters).items():
        build = hasattr(found, "build_prompt") and found().build_prompt
        if build and next(build(_TYPED)) == trained:
            return f"Run {command} --prompter {name}{gradio}"
    if trained != trained.strip():
        return (
            "It cannot be typed either, for the space around it; use "
            "PeftModel.from_pretrained(base, output_dir).generate(...)"
        )
    without = ", without chat_template: in the config" if cfg.chat_template else ""
    return f"Run {command}{gradio}{without}, and type the whole form"
