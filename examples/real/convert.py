"""Write a GGUF file's model and tokenizer in transformers' format.

Run with the package ``gguf`` on the path: ``python convert.py FILE DIRECTORY``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_base import generate_merges

_TOKENS = ("bos", "eos", "unknown", "padding")
# Kinds of tokens in a file.
_NORMAL, _SPECIAL, _USER_DEFINED = 1, 3, 4
# The pretrained model's file has none; its tokens are in the vocabulary.
_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_GEMMA_END = "<end_of_turn>"


def convert(file: Path, directory: Path) -> None:
    given = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    # transformers 5.24 takes it for a quantised model, which it does not save: the
    # weights go into another.
    vars(model.config).pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    said = _Said(file)
    if said("model") == "llama":
        tokenizer = _gemma(said)
    else:
        tokenizer = _smollm2(AutoTokenizer.from_pretrained(**given), said)
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


class _Said:
    """What a file says of its tokenizer, by the names of GGUF."""

    def __init__(self, file: Path) -> None:
        self._fields = GGUFReader(file).fields

    def __call__(self, name: str) -> Any:
        return self._fields[f"tokenizer.ggml.{name}"].contents()


def _smollm2(read: Any, said: _Said) -> PreTrainedTokenizerFast:
    """Return a tokenizer with what transformers does not read of the file (5.16.1 the
    special tokens, 5.24 neither how text is split)."""
    backend = read.backend_tokenizer
    # Digits alone, as in the tokenizer that the model was trained with.
    split = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.ByteLevel()
    return _with_tokens(backend, said, chat_template=read.chat_template)


def _gemma(said: _Said) -> PreTrainedTokenizerFast:
    """Return a tokenizer made from the file's vocabulary.

    The one that transformers 5.16.1 reads splits words that the vocabulary has, and
    does not add <bos>.
    """
    # llama.cpp writes runs of spaces as such.
    texts = [text.replace(" ", "▁") for text in said("tokens")]
    kinds = said("token_type")
    vocabulary = {text: n for n, text in enumerate(texts)}
    scores = dict(zip(texts, said("scores"), strict=True))
    kind_of = dict(zip(texts, kinds, strict=True))

    def of_kind(kind: int) -> list[str]:
        return [text for text in texts if kind_of[text] == kind]

    merged = {text: scores[text] for text in of_kind(_NORMAL)}
    merges = generate_merges(vocabulary, merged)
    model = BPE(
        vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_tokens([AddedToken(text) for text in of_kind(_USER_DEFINED)])
    backend.add_special_tokens(
        [AddedToken(text, normalized=False) for text in of_kind(_SPECIAL)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return _with_tokens(
        backend, said, chat_template=_GEMMA_TEMPLATE, eos_token=_GEMMA_END
    )


def _with_tokens(
    backend: Tokenizer, said: _Said, **more: Any
) -> PreTrainedTokenizerFast:
    ids = [said(f"{name}_token_id") for name in _TOKENS]
    bos, eos, unknown, padding = map(backend.id_to_token, ids)
    named = {
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unknown,
        "pad_token": padding,
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**named, **more})


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
