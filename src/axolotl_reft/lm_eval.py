"""Score LoReFT adapters with lm_eval, the evaluation harness (0.4.11).

lm_eval's own ``hf`` model scores context and continuation as one prompt, so that the
edited suffix falls on the continuation. Here every request's context is the prompt.

``python -m axolotl_reft.lm_eval --model loreft --model_args peft=DIR --tasks …`` is
lm_eval's command line with this model in it; lm_eval has no entry point for models.

Shapes: B batch, T tokens, C tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from axolotl_reft.saved.directory import check_adapter_fits, read_adapter_config
from axolotl_reft.tuner.model import LoreftModel

# The request's text, tokens of its context, tokens of its continuation.
_Request = tuple[Any, list[int], list[int]]
_TOKENIZER_CONFIG = "tokenizer_config.json"


@register_model("loreft")
class LoreftLM(HFLM):
    """A base model with a LoReFT adapter; each request's context is its prompt.

    Args:
        pretrained: the base model, by default the one that the adapter names; or a
            loaded ``PeftModel``.
        peft: directory or hub id of the adapter, where ``pretrained`` is not loaded.
        tokenizer: by default the adapter's, if there is one beside it, or the base's.
        kwargs: as for lm_eval's ``hf`` model.

    Raises:
        ValueError: no LoReFT adapter is given, or one of another base.
    """

    _model: Any

    def __init__(
        self,
        pretrained: Any = None,
        peft: str | None = None,
        tokenizer: Any = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        if pretrained is None or isinstance(pretrained, str):
            pretrained = _base_of(peft, pretrained)
            if tokenizer is None and (Path(str(peft)) / _TOKENIZER_CONFIG).is_file():
                tokenizer = peft
        elif not isinstance(getattr(pretrained, "base_model", None), LoreftModel):
            raise ValueError(
                f"pretrained: a {type(pretrained).__name__} without a LoReFT adapter; "
                "load one with PeftModel.from_pretrained(base, directory)"
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(
            pretrained, peft=peft, tokenizer=tokenizer, device=device, **kwargs
        )

    def _create_model(self, pretrained: str, peft: str, **kwargs: Any) -> None:
        super()._create_model(pretrained, **kwargs)
        # lm_eval's own loading of adapters also cuts off rows that pad the vocabulary,
        # which changes every probability.
        if len(self.tokenizer) > self._model.get_input_embeddings().num_embeddings:
            self._model.resize_token_embeddings(len(self.tokenizer))
        self._model = PeftModel.from_pretrained(self._model, peft)

    def loglikelihood_rolling(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[float]:
        check_rolling(self.model.peft_config[self.model.active_adapter].positions)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[_Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        # Continuations that differ in their last token alone share a forward. Unlike in
        # lm_eval, equal tokens that are split elsewhere do not: their prompts differ.
        sharing: dict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            sharing[tuple(context), tuple(continuation[:-1])].append(number)
        inputs: list[_Request] = [
            (numbers, *requests[numbers[0]][1:]) for numbers in sharing.values()
        ]
        answers: list[Any] = [None] * len(requests)
        quiet = disable_tqdm or self.rank != 0
        progress = tqdm(total=len(requests), disable=quiet, desc="loglikelihood")
        for batch in self._batches(inputs, override_bs):
            for (numbers, _, _), scores_CV in zip(
                batch, self._scores(batch), strict=True
            ):
                for number in numbers:
                    asked, _, continuation = requests[number]
                    answers[number] = _answer(scores_CV, continuation)
                    if asked is not None:
                        self.cache_hook.add_partial(
                            "loglikelihood", asked, answers[number]
                        )
                progress.update(len(numbers))
        progress.close()
        return answers

    def _batches(
        self, inputs: list[_Request], override_bs: int | None
    ) -> Iterator[list[_Request]]:
        """Batches, longest first, so that one too large for memory fails at once."""

        def key(request: _Request) -> tuple[int, list[int]]:
            return -len(request[1] + request[2]), request[1] + request[2]

        finds_size = self.batch_size == "auto" and not override_bs
        size = override_bs if self.batch_size == "auto" else self.batch_size
        return Collator(inputs, sort_fn=key).get_batched(
            n=size or 0, batch_fn=self._batch_scheduler if finds_size else None
        )

    def _scores(self, batch: list[_Request]) -> Iterator[Tensor]:
        """Log probabilities (C, V) where each request's continuation is predicted."""
        rows = [
            (context + continuation)[-(self.max_length + 1) :][:-1]
            for _, context, continuation in batch
        ]
        width = max(map(len, rows))
        ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        labels_BT = torch.full_like(ids_BT, -100)
        prompts = []
        for index, row in enumerate(rows):
            # The last token of the continuation is not in the row.
            prompt = len(row) + 1 - len(batch[index][2])
            ids_BT[index, : len(row)] = torch.tensor(row)
            mask_BT[index, : len(row)] = 1
            labels_BT[index, prompt : len(row)] = ids_BT[index, prompt : len(row)]
            prompts.append(prompt)
        dtype = self.mixed_precision_dtype
        autocast = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        with torch.no_grad(), autocast:
            logits_BTV = self.model(
                input_ids=ids_BT.to(self.device),
                attention_mask=mask_BT.to(self.device),
                labels=labels_BT.to(self.device),
            ).logits
        for logits_TV, row, prompt in zip(logits_BTV, rows, prompts, strict=True):
            answer_CV = logits_TV[prompt - 1 : len(row)]
            yield answer_CV.log_softmax(-1, dtype=self.softmax_dtype)


def _answer(scores_CV: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """A continuation's log probability, and whether it is the most probable one."""
    tokens_C = torch.tensor(continuation, device=scores_CV.device)
    logs_C = scores_CV.gather(1, tokens_C.unsqueeze(1))
    greedy = bool((scores_CV.argmax(1) == tokens_C).all())
    return float(logs_C.sum()), greedy


def _base_of(peft: str | None, base: str | None) -> str:
    """The base model to load, checked against the adapter."""
    if not peft:
        raise ValueError(
            "peft: no adapter is given; name the output_dir of a training, for example "
            "--model_args peft=outputs/loreft"
        )
    base = base or read_adapter_config(peft, "peft").base_model_name_or_path
    config = AutoConfig.from_pretrained(base).get_text_config()
    check_adapter_fits(peft, "peft", config.hidden_size, config.num_hidden_layers)
    return str(base)


def check_rolling(positions: str) -> None:
    """Refuse perplexity tasks, whose texts have no prompt, with prompt positions.

    Raises:
        ValueError: the adapter edits prompt positions.
    """
    if positions != "all":
        raise ValueError(
            "loglikelihood_rolling (perplexity of whole texts) with an adapter of "
            f"positions: {positions}: such texts have no prompt, so that nothing would "
            "be edited and the bare base scored; choose tasks with a context, or train "
            "with positions: all"
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
