"""Tasks that go on with one prompt several times: choices after a context, and answers
of several adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from torch import nn

from benchmarks.base import Setting, clock, rectangle, share
from benchmarks.contestants import our_config, ours

_ADAPTERS, _NEW_TOKENS = 8, 8


def multiple_choice(
    name: str, base: nn.Module, setting: Setting
) -> Callable[[], float]:
    """Seconds in which lm_eval's requests for ``batch`` choices of one context are
    scored, by whole rows or on the context's cache."""
    from axolotl_reft import lm_eval

    lm = lm_eval.LoreftLM(
        ours(share(base), setting).model.eval(),
        tokenizer=_tokenizer(),
        device=setting.device,
        batch_size=setting.batch,
    )
    # The last token is no row's.
    longer = rectangle(setting.but(length=setting.length + 1)).inputs["input_ids"]
    context = longer[0, : setting.prompt].tolist()
    choices = longer[:, setting.prompt :].tolist()
    requests = [(None, context, choice) for choice in choices]
    now = clock(setting)

    def turn() -> float:
        start = now()
        lm._loglikelihood_tokens(requests, disable_tqdm=True)
        return now() - start

    def whole_rows() -> float:
        with patch.object(lm_eval, "_with_shared_contexts", lambda rows, _: ([], rows)):
            return turn()

    return whole_rows if name == "whole-rows" else turn


def many_adapters(name: str, base: nn.Module, setting: Setting) -> Callable[[], float]:
    """Seconds in which eight adapters answer one prompt by eight tokens each, on caches
    of their own or on one."""
    from transformers import DynamicCache

    model: Any = ours(share(base), setting).model.eval()
    names = ["default", *(f"adapter{number}" for number in range(1, _ADAPTERS))]
    for added in names[1:]:
        model.add_adapter(added, our_config(setting))
    ids, now = (
        rectangle(setting).inputs["input_ids"][:, : setting.prompt],
        clock(setting),
    )
    asked = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS}

    def turn() -> float:
        start, cache = now(), DynamicCache()
        for adapter in names:
            model.set_adapter(adapter)
            if name == "fresh":
                cache = DynamicCache()
            model.generate(
                ids, past_key_values=cache, do_sample=False, pad_token_id=0, **asked
            )
        return now() - start

    return turn


def _tokenizer() -> Any:
    """The least that lm_eval takes, where all requests are of token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<s>")
