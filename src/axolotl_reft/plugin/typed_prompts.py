"""Warn where ``axolotl inference`` builds prompts otherwise than training did.

It puts the training's text around a typed prompt only where ``--prompter`` or a chat
template asks for it; without that text the adapter edits other tokens.
"""

from __future__ import annotations

import sys
from typing import Any

from axolotl import prompters
from axolotl.cli.args import InferenceCliArgs
from axolotl.cli.utils import resolve_chat_template_str
from axolotl.loaders import load_tokenizer
from axolotl.prompt_strategies import load
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.data.wrappers import DATASET_HANDLERS
from axolotl.utils.logging import get_logger
from datasets import Dataset
from transformers import HfArgumentParser

LOG = get_logger(__name__)

_TYPED = "{instruction}"


def warn_of_other_prompts(cfg: Any, chat: bool) -> None:
    """Warn where typed prompts differ from those of the first data set.

    Args:
        chat: the command is ``axolotl inference --chat``.
    """
    parser = HfArgumentParser(InferenceCliArgs)
    options, _ = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if options.prompter or not cfg.datasets or cfg.reward_model:
        return
    dataset, tokenizer = cfg.datasets[0], load_tokenizer(cfg)
    template = resolve_chat_template_str(cfg, tokenizer)
    if chat:
        template = template or tokenizer.chat_template
    if "chat_template" in str(dataset.type):
        if template != get_chat_template_from_config(cfg, dataset, tokenizer):
            name = dataset.chat_template or "tokenizer_default"
            beside = ", with its chat_template_jinja" if name == "jinja" else ""
            LOG.warning(
                "training put prompts into the chat template of the first data set, "
                "and axolotl inference does not: the adapter edits other tokens. "
                "Write chat_template: %s at the top of the config%s",
                name,
                beside,
            )
    elif not cfg.rl:
        try:
            trained = _trained_prompt(cfg, dataset, tokenizer)
        except Exception as error:  # any strategy's; a hint must not stop inference
            LOG.debug("the form of the first data set's prompts: %s", error)
            return
        if trained is None:
            return
        # Compared as ids: a tokenizer may drop the difference.
        typed, whole = (tokenizer(text).input_ids for text in (_TYPED, trained))
        if template or typed != whole:
            LOG.warning(
                "training put prompts into the form %r, and axolotl inference does "
                "not: the adapter edits other tokens. %s",
                trained,
                _remedy(cfg, trained),
            )


def _trained_prompt(cfg: Any, dataset: Any, tokenizer: Any) -> str | None:
    """A prompt's text in training, with ``_TYPED`` for its instruction, or None."""
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
        return None
    if hasattr(prompter, "build_prompt_w_system"):
        return next(prompter.build_prompt_w_system(system, _TYPED))
    return next(prompter.build_prompt(_TYPED))


def _remedy(cfg: Any, trained: str) -> str:
    command = f"axolotl inference {cfg.axolotl_config_path}"
    gradio = " --gradio" if "--gradio" in sys.argv else ""
    for name, found in vars(prompters).items():
        if hasattr(found, "build_prompt") and trained == next(
            found().build_prompt(_TYPED)
        ):
            return f"Run {command} --prompter {name}{gradio}"
    if trained != trained.strip():
        return (
            "Nor can it be typed, without the space around it; answer in Python, with "
            "PeftModel.from_pretrained(base, output_dir).generate(...)"
        )
    without = ", without chat_template: in the config" if cfg.chat_template else ""
    return f"Run {command}{gradio}{without}, and type the whole form"
