"""Write a GGUF file's model and tokenizer in transformers' format.

Run with the package ``gguf`` on the path: ``python convert.py FILE DIRECTORY``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import decoders, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

_TOKENS = ("bos", "eos", "unknown", "padding")


def convert(file: Path, directory: Path) -> None:
    given = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    # transformers 5.24 takes it for a quantised model, which it does not save: the
    # weights go into another.
    vars(model.config).pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(**given)
    _as_in_file(tokenizer, file).save_pretrained(directory)


def _as_in_file(
    tokenizer: PreTrainedTokenizerBase, file: Path
) -> PreTrainedTokenizerBase:
    """Return a tokenizer with what transformers does not read of the file (5.16.1 the
    special tokens, 5.24 neither how text is split)."""
    fields = GGUFReader(file).fields
    ids = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in _TOKENS]
    bos, eos, unknown, padding = tokenizer.convert_ids_to_tokens(ids)
    backend = tokenizer.backend_tokenizer
    if fields["tokenizer.ggml.pre"].contents() == "smollm":
        # Digits alone, as in the tokenizer that the model was trained with.
        split = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        backend.pre_tokenizer = pre_tokenizers.Sequence(split)
        backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        pad_token=padding,
        chat_template=tokenizer.chat_template,
    )


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
