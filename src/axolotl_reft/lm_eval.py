"""Score LoReFT adapters with lm_eval, the evaluation harness (0.4.11).

lm_eval's own ``hf`` model scores context and continuation as one prompt, so that the
edited suffix falls on the continuation. Here every request's context is the prompt.
lm_eval has no entry point for models; its command line with this one in it is
``python -m axolotl_reft.lm_eval --model loreft --model_args peft=DIR --tasks …``.

Continuations of one context are scored on its cache, which is computed once.

Shapes: R rows, T tokens, N contexts, L tokens of each, A tokens of an answer (C but for
the last), C of a continuation, Q requests, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig

from axolotl_reft.saved.directory import check_adapter_fits, read_adapter_config
from axolotl_reft.tuner.cached_edits import has_rows, rows_of
from axolotl_reft.tuner.compat import cache_of, forward_parameters
from axolotl_reft.tuner.model import LoreftModel

# The request's text, tokens of its context, tokens of its continuation.
_Request = tuple[Any, list[int], list[int]]
# Log probability, and whether each token is the likeliest.
_Score = tuple[float, bool]
# A forward of few tokens takes as long as one of so many: a CPU reads the weights, and
# an accelerator waits for the host.
_LEAST_TOKENS = {"cpu": 64, "accelerator": 1024}


@dataclass(eq=False)
class _Row:
    """A row of a forward.

    Attributes:
        prompt: the context, as far as it fits.
        answer: the continuation but for its last token.
        asked: requests that differ in that token alone: their numbers, and all tokens
            of their continuations.
        batch_size: most rows in a forward of rows as long.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    asked: list[tuple[int, list[int]]] = field(default_factory=list)
    batch_size: int = 1

    @property
    def width(self) -> int:
        return len(self.prompt) + len(self.answer)


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
    ) -> list[_Score]:
        scores: list[_Score] = [(0.0, True)] * len(requests)  # of no tokens
        quiet = disable_tqdm or self.rank != 0
        progress = tqdm(total=len(requests), disable=quiet, desc="loglikelihood")
        for rows, logits_RCV in self._logits(self._rows(requests, override_bs)):
            for number, score in _scores(rows, logits_RCV, self.softmax_dtype):
                scores[number], text = score, requests[number][0]
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, score)
                progress.update()
        progress.close()
        return scores

    def _rows(self, requests: Sequence[_Request], size: int | None) -> list[_Row]:
        """Return the rows of all requests, longest first, so that a batch too large for
        memory fails at once."""
        found: dict[Any, _Row] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not continuation:
                continue
            ids = (context + continuation)[-(self.max_length + 1) : -1]
            prompt = len(ids) - len(continuation) + 1
            if prompt < 1:
                raise ValueError(
                    f"max_length: {self.max_length} leaves no token of a context of "
                    f"{len(context)} before a continuation of {len(continuation)}; "
                    "pass a larger max_length, or leave such requests out"
                )
            # Unlike in lm_eval, equal tokens that are split elsewhere are another row:
            # their prompts differ.
            key = tuple(ids[:prompt]), tuple(ids[prompt:])
            row = found.setdefault(key, _Row(*key))
            row.asked.append((number, continuation))
        rows = sorted(found.values(), key=_by_width)
        detects = self.batch_size == "auto" and not size
        firsts = [requests[row.asked[0][0]] for row in rows]
        for place, row in enumerate(rows):
            if detects:
                row.batch_size = self._batch_scheduler(place, firsts)
            else:
                row.batch_size = size or self.batch_size
        return rows

    @torch.no_grad()
    def _logits(self, rows: list[_Row]) -> Iterator[tuple[list[_Row], Tensor]]:
        """Yield rows, with logits (R, C, V) of their continuations."""
        kind = "cpu" if self.device.type == "cpu" else "accelerator"
        batches, others = _with_shared_contexts(rows, _LEAST_TOKENS[kind])
        shared = deque(batches)
        while shared and (prefilled := self._prefilled(shared[0])):
            yield from self._on_cache(shared.popleft(), *prefilled)
        for batch in shared:  # on a base whose cache is of no use
            others += batch
        for batch in _batches(sorted(others, key=_by_width)):
            yield batch, self._logits_of_whole_rows(batch)

    def _logits_of_whole_rows(self, rows: list[_Row]) -> Tensor:
        labels = [[-100] * len(row.prompt) + [*row.answer] for row in rows]
        logits_RTV = self._forward(
            input_ids=self._sent([row.prompt + row.answer for row in rows]),
            attention_mask=self._sent([[1] * row.width for row in rows]),
            labels=self._sent(labels, -100),
        ).logits
        start_R1 = self._sent([[len(row.prompt) - 1] for row in rows])
        longest = max(len(row.answer) for row in rows) + 1
        columns_RC = start_R1 + torch.arange(longest, device=self.device)
        columns_RC = columns_RC.clamp(max=logits_RTV.shape[1] - 1)
        rows_R1 = torch.arange(len(rows), device=self.device).unsqueeze(1)
        return logits_RTV[rows_R1, columns_RC]

    def _prefilled(self, rows: list[_Row]) -> tuple[Tensor, Any] | None:
        """Compute the contexts of these rows, each of them once.

        Returns:
            The logits (N, V) of their last tokens and the cache; None where the base
            has none to go on with for several rows.
        """
        wanted = {"use_cache": True, "logits_to_keep": 1}
        taken = forward_parameters(self.model.get_base_model())
        ids_NL = self._sent(_contexts(rows))
        output = self._forward(
            input_ids=ids_NL,
            attention_mask=torch.ones_like(ids_NL),
            **{name: value for name, value in wanted.items() if name in taken},
        )
        cache = cache_of(output)
        return (output.logits[:, -1], cache) if has_rows(cache, len(ids_NL)) else None

    def _on_cache(
        self, rows: list[_Row], last_NV: Tensor, cache: Any
    ) -> Iterator[tuple[list[_Row], Tensor]]:
        """Yield rows and logits of continuations after contexts that are computed."""
        numbers = {prompt: number for number, prompt in enumerate(_contexts(rows))}

        def contexts(rows: list[_Row]) -> Tensor:
            return self._sent([[numbers[row.prompt] for row in rows]])[0]

        for batch in _batches([row for row in rows if row.answer]):
            answers, contexts_R = [row.answer for row in batch], contexts(batch)
            logits_RAV = self._forward(
                input_ids=self._sent(answers),
                attention_mask=self._sent([[1] * row.width for row in batch]),
                labels=self._sent(answers, -100),
                past_key_values=rows_of(cache, contexts_R),
            ).logits
            yield batch, torch.cat([last_NV[contexts_R].unsqueeze(1), logits_RAV], 1)
        # Of one token, which has the logits of the context's last.
        short = [row for row in rows if not row.answer]
        if short:
            yield short, last_NV[contexts(short)].unsqueeze(1)

    def _forward(self, **inputs: Any) -> Any:
        dtype = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.model(**inputs)

    def _sent(self, rows: Iterable[Sequence[int]], padding: int = 0) -> Tensor:
        return _sent(rows, self.device, padding)


def _sent(rows: Iterable[Sequence[int]], device: torch.device, padding: int) -> Tensor:
    """Return padded rows on a device, whose work under way is not waited for."""
    tensor = pad_sequence([torch.tensor(row) for row in rows], True, padding)
    return tensor.to(device, non_blocking=True)


def _by_width(row: _Row) -> int:
    return -row.width


def _contexts(rows: Iterable[_Row]) -> list[tuple[int, ...]]:
    return [*dict.fromkeys(row.prompt for row in rows)]


def _batches(rows: list[_Row]) -> Iterator[list[_Row]]:
    start = 0
    while start < len(rows):
        stop = start + rows[start].batch_size
        yield rows[start:stop]
        start = stop


def _with_shared_contexts(
    rows: list[_Row], least_tokens: int
) -> tuple[list[list[_Row]], list[_Row]]:
    """Return batches of rows whose contexts are computed once, and the other rows.

    Contexts of a batch are equally long, so that their cache has no padding. A batch
    must save the work of the forwards that it takes more, each of ``least_tokens``.
    """
    by_context: dict[Any, list[_Row]] = defaultdict(list)
    for row in rows:
        by_context[row.prompt].append(row)
    batches: list[list[_Row]] = []
    others: list[_Row] = []
    open_batches: dict[int, list[_Row]] = {}
    for context, group in by_context.items():
        batch = open_batches.get(len(context), [])
        if len(group) == 1:
            others += group
        elif batch and len(batch) + len(group) <= batch[0].batch_size:
            batch += group
        else:
            open_batches[len(context)] = group
            batches.append(group)
    shared = []
    for batch in batches:
        size, saved = batch[0].batch_size, len(batch) - len(_contexts(batch))
        answers = sum(bool(row.answer) for row in batch)
        more = 1 + ceil(answers / size) - len(batch) / size
        if saved * len(batch[0].prompt) >= least_tokens * more:
            shared.append(batch)
        else:
            others += batch
    return shared, others


def _scores(
    rows: list[_Row], logits_RCV: Tensor, dtype: torch.dtype | None
) -> list[tuple[int, _Score]]:
    """Return the scores of these rows' requests, by number; a device is waited for once
    for all of them."""
    asked = [
        (place, *request) for place, row in enumerate(rows) for request in row.asked
    ]
    places, numbers, continuations = zip(*asked, strict=True)
    device = logits_RCV.device
    tokens_QC = _sent(continuations, device, -1)
    rows_Q1 = _sent([places], device, 0).T
    columns_C = torch.arange(tokens_QC.shape[1], device=device)
    padding_QC = tokens_QC < 0
    logs_RCV = logits_RCV.log_softmax(-1, dtype=dtype)
    logs_QC = logs_RCV[rows_Q1, columns_C, tokens_QC.clamp(min=0)]
    likeliest_QC = logs_RCV.argmax(-1)[rows_Q1, columns_C]
    are_likeliest_Q = ((likeliest_QC == tokens_QC) | padding_QC).all(1)
    totals_Q = logs_QC.masked_fill(padding_QC, 0).sum(1)
    scores = zip(totals_Q.tolist(), are_likeliest_Q.tolist(), strict=True)
    return [*zip(numbers, scores, strict=True)]


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
