#!/usr/bin/env bash
# One would guess: an installed package that nobody imports and no setting names changes
# nothing about a model on a CPU, least of all whether it can be saved whole.
#
# What happens: where the package kernels is installed, each attention of a Llama keeps an
# object made from a function (its rotary embedding, to be replaced by a kernel), whose
# class is local to a function. torch.save(model) and pickle, and so everything that sends
# a model to a spawned process, then raise "Can't pickle local object". copy.deepcopy and
# save_pretrained work, and so does all with USE_HUB_KERNELS=0. axolotl brings kernels
# along, transformers and PEFT do not: the same script works in one environment and fails
# in the other.
#
# Version: transformers 5.16.1, kernels 0.16.2, torch 2.13.0 (CPU), Python 3.11.
# Source: running this.
#
# Met in: sending a model to a process, in the environment of axolotl 0.19.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" install --quiet torch==2.13.0 numpy transformers==5.16.1
for run in absent present disabled; do
  [ $run != present ] || "$pip" install --quiet kernels==0.16.2
  [ $run != disabled ] || export USE_HUB_KERNELS=0
  "$work/venv/bin/python" - $run <<'PYTHON' 2>"$work/log" || { cat "$work/log"; exit 1; }
import copy
import pickle
import sys

import transformers
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
}
model = LlamaForCausalLM(LlamaConfig(**SIZES))
copy.deepcopy(model)
try:
    pickle.dumps(model)
    said = "pickled"
except AttributeError as error:
    said = str(error)
print(f"transformers {transformers.__version__}, kernels {sys.argv[1]}: {said}")
assert (said != "pickled") == (sys.argv[1] == "present")
PYTHON
done
