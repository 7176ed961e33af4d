"""Score LoReFT adapters with lm_eval, the evaluation harness (0.4.11).

lm_eval's own ``hf`` model scores context and continuation as one prompt, so that the
edited suffix falls on the continuation. Here every request's context is the prompt.
lm_eval has no entry point for models; its command line with this one in it is
``python -m axolotl_reft.lm_eval --model loreft --model_args peft=DIR --tasks …``.

Shapes: B batch, T tokens, C tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig

from axolotl_reft.saved.directory import check_adapter_fits, read_adapter_config
from axolotl_reft.tuner.model import LoreftModel

# The request's text, tokens of its context, tokens of its continuation.
_Request = tuple[Any, list[int], list[int]]
# Stands between context and continuation where requests are compared; no token's id.
_SPLIT = -1


@register_model("loreft")
class LoreftLM(HFLM):
    """A base model with a LoReFT adapter; each request's context is its prompt.

    Args:
        pretrained: a loaded ``PeftModel``, or the base model; by default the one that
            the adapter names.
        peft: directory or hub id of the adapter, where ``pretrained`` is not loaded.
        tokenizer: by default the adapter's, or else the base's.
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
            if not peft:
                raise ValueError("peft: no adapter is given; name its directory")
            saved = read_adapter_config(peft, "peft")
            pretrained = pretrained or saved.base_model_name_or_path
            base = AutoConfig.from_pretrained(pretrained).get_text_config()
            check_adapter_fits(peft, "peft", base.hidden_size, base.num_hidden_layers)
            if tokenizer is None and Path(peft, "tokenizer_config.json").is_file():
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
        ordered = Collator(
            requests,
            # Longest first, so that a batch too large for memory fails at once.
            sort_fn=lambda request: -len(request[1] + request[2]),
            group_fn=lambda request: [*request[1], _SPLIT, *request[2][:-1]],
            group_by="contexts",
        )
        if self.batch_size == "auto" and not override_bs:
            batches = ordered.get_batched(n=0, batch_fn=self._batch_scheduler)
        else:
            batches = ordered.get_batched(n=override_bs or self.batch_size)
        answers = []
        quiet = disable_tqdm or self.rank != 0
        progress = tqdm(total=len(requests), disable=quiet, desc="loglikelihood")
        for (text, context, continuation), scores_1CV in self._scores(batches):
            for asked, expected, shared_1CV in ordered.get_cache(
                text, [*context, _SPLIT], continuation, scores_1CV
            ):
                scores_CV = shared_1CV[0]
                tokens_C = torch.tensor(expected, device=scores_CV.device)
                total = scores_CV.gather(1, tokens_C.unsqueeze(1)).sum()
                is_greedy = bool((scores_CV.argmax(1) == tokens_C).all())
                answers.append((float(total), is_greedy))
                if asked is not None:
                    self.cache_hook.add_partial("loglikelihood", asked, answers[-1])
                progress.update()
        progress.close()
        return ordered.get_original(answers)

    @torch.no_grad()
    def _scores(
        self, batches: Iterator[list[_Request]]
    ) -> Iterator[tuple[_Request, Tensor]]:
        """Yield requests, with log probabilities (1, C, V) of their continuations."""
        for batch in batches:
            rows, labels = [], []
            for _, context, continuation in batch:
                # The last token of the continuation is not in the row.
                row = (context + continuation)[-(self.max_length + 1) : -1]
                prompt = len(row) - len(continuation) + 1
                rows.append(torch.tensor(row))
                labels.append(torch.tensor([-100] * prompt + continuation[:-1]))
            mask = [torch.ones_like(row_T) for row_T in rows]
            dtype = self.mixed_precision_dtype
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                logits_BTV = self.model(
                    input_ids=pad_sequence(rows, True).to(self.device),
                    attention_mask=pad_sequence(mask, True).to(self.device),
                    labels=pad_sequence(labels, True, -100).to(self.device),
                ).logits
            for index, request in enumerate(batch):
                stop = len(rows[index])
                logits_1CV = logits_BTV[index, None, stop - len(request[2]) : stop]
                yield request, logits_1CV.log_softmax(-1, dtype=self.softmax_dtype)


def check_rolling(positions: str) -> None:
    """Raise a ValueError for perplexity tasks and an adapter of prompt positions."""
    if positions != "all":
        raise ValueError(
            f"loglikelihood_rolling with positions: {positions}: such texts have no "
            "prompt, so that nothing would be edited; choose tasks with a context"
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
