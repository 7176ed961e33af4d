"""How much text can d + 1 numbers hold? The paper's memorisation experiment, small.

After arXiv 2404.03592, appendix F. Run from the repository root, once
`python examples/tiny-llama/make_base.py` has made the base model:
`python examples/memorisation/memorise.py`. It takes about 3 minutes on one CPU core and
writes `results.json` and `recovered.png` beside this file. With
`--intervention consreft`, the paper's own edit, it writes to `outputs/memorisation`.
"""

import argparse
import json
import os
import platform
import random
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from string import ascii_lowercase as LETTERS
from typing import TypedDict

import torch
from matplotlib.figure import Figure
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from axolotl_reft import LoreftConfig

HERE = Path(__file__).parent
BASE_DIR = HERE.parent / "tiny-llama" / "base"
OUTPUTS = Path("outputs/memorisation")
MAKE_BASE = "python examples/tiny-llama/make_base.py"

# `l1` takes at most half of a prompt, so one of a single token would not be edited.
PROMPT = "mirror ="
OWN, RANDOM = "the base's own words", "random letters"
LENGTHS = (2, 4, 8, 16, 32)
SEEDS = (0, 1, 2)
STEPS = 200
PEAK_LR = 0.1
# Both leave out Wh, so that the edit holds the text and the input does not matter.
INTERVENTIONS = ("lobireft", "consreft")


class Run(TypedDict):
    """One adapter: what it was to hold and what it gave back."""

    text: str
    layer: int
    length: int
    seed: int
    recovered: int
    steps: int


class Text(TypedDict):
    """What is to be held, and how it looks to the base."""

    text: str
    seed: int
    tokens: str
    nats_per_token: float
    recovered_without_adapter: int


def own_words(model: PreTrainedModel, start: list[int], count: int) -> list[int]:
    """Sample what the model says after the start: a text that it predicts well."""
    tokens = model.generate(
        input_ids=torch.tensor([start]),
        attention_mask=torch.ones(1, len(start), dtype=torch.long),
        max_new_tokens=count,
        do_sample=True,
        top_k=0,
    )
    return tokens[0, len(start) :].tolist()


def make_texts(
    model: PreTrainedModel, prompt: list[int], letters: list[int], seed: int
) -> dict[str, list[int]]:
    """Two texts that begin with the same letter, which the prompt does not suggest.

    That letter must be told in both. In one the base knows how to go on from there, in
    the other each letter has to be told anew.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    random_text = rng.choices(letters, k=max(LENGTHS))
    first = random_text[:1]
    rest = own_words(model, prompt + first, max(LENGTHS) - 1)
    return {OWN: first + rest, RANDOM: random_text}


@torch.no_grad()
def nats_per_token(
    model: PreTrainedModel, prompt: list[int], target: list[int]
) -> float:
    """The model's mean loss on the text: 0 for one that it is certain of."""
    input_ids, labels = make_row(prompt, target)
    return model(input_ids=input_ids, labels=labels).loss.item()


def make_row(prompt: list[int], target: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels; only the target carries a label."""
    input_ids = torch.tensor([prompt + target])
    return input_ids, torch.tensor([[-100] * len(prompt) + target])


def count_recovered(given: list[int], target: list[int]) -> int:
    """Tokens that are right before the first that is wrong or missing."""
    for index, token in enumerate(target):
        if index == len(given) or given[index] != token:
            return index
    return len(target)


def recall(model: PreTrainedModel, prompt: list[int], target: list[int]) -> int:
    """Tokens of the target that the model gives greedily after the prompt."""
    tokens = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=len(target),
        do_sample=False,
    )
    return count_recovered(tokens[0, len(prompt) :].tolist(), target)


def memorise(
    base: PreTrainedModel,
    prompt: list[int],
    target: list[int],
    layer: int,
    steps: int = STEPS,
    intervention: str = INTERVENTIONS[0],
) -> tuple[int, int]:
    """Train one adapter to answer the prompt with the target.

    Returns:
        Tokens recovered, and steps taken. The base is given back as it was.
    """
    config = LoreftConfig(
        task_type="CAUSAL_LM",
        layers=[layer],
        positions="l1",
        rank=1,
        intervention=intervention,
    )
    model = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, PEAK_LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    input_ids, labels = make_row(prompt, target)
    wanted = torch.tensor(target)
    taken = 0
    while taken < steps:
        output = model(input_ids=input_ids, labels=labels)
        # Right at every token when fed the target is right when generated as well.
        if output.logits[0, len(prompt) - 1 : -1].argmax(-1).equal(wanted):
            break
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        schedule.step()
        taken += 1
    model.eval()
    recovered = recall(model, prompt, target)
    model.unload()
    return recovered, taken


def measure(
    base: PreTrainedModel,
    prompt: list[int],
    target: list[int],
    text: str,
    layer: int,
    seed: int,
    intervention: str,
) -> list[Run]:
    """One adapter for each length of the text, at one layer."""
    runs: list[Run] = []
    for length in LENGTHS:
        torch.manual_seed(seed)
        recovered, steps = memorise(
            base, prompt, target[:length], layer, intervention=intervention
        )
        runs.append(
            {
                "text": text,
                "layer": layer,
                "length": length,
                "seed": seed,
                "recovered": recovered,
                "steps": steps,
            }
        )
    return runs


def load_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The demo's base model, which here goes on past the end of an answer."""
    if not (BASE_DIR / "config.json").is_file():
        raise SystemExit(f"there is no base model yet; make it with: {MAKE_BASE}")
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR)
    # A text may hold </s>, which is a token like any other to whoever recites.
    model.generation_config.eos_token_id = None
    return model.eval(), AutoTokenizer.from_pretrained(BASE_DIR)


def best(runs: list[Run], text: str, layer: int, seed: int) -> int:
    """The most that one seed's adapters at a layer gave back, whatever the length."""
    return max(
        run["recovered"]
        for run in runs
        if (run["text"], run["layer"], run["seed"]) == (text, layer, seed)
    )


def plot(runs: list[Run], directory: Path) -> None:
    """Draw the tokens recovered against the layer, a line per kind of text."""
    layers = sorted({run["layer"] for run in runs})
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for text, colour, marker in ((OWN, "tab:blue", "o"), (RANDOM, "tab:orange", "s")):
        found = [[best(runs, text, layer, seed) for seed in SEEDS] for layer in layers]
        means = [sum(counts) / len(counts) for counts in found]
        axes.plot(layers, means, color=colour, marker=marker, label=f"{text}, mean")
        for layer, counts in zip(layers, found, strict=True):
            axes.scatter([layer] * len(counts), counts, color=colour, alpha=0.35, s=18)
    axes.set_yscale("log", base=2)
    axes.set_yticks([1, 2, 4, 8, 16, 32], labels=["1", "2", "4", "8", "16", "32"])
    axes.set_ylim(0.8, 40)
    axes.set_xticks(layers)
    axes.set_xlabel("edited layer (0 is the lowest)")
    axes.set_ylabel(f"tokens recovered, of up to {max(LENGTHS)}")
    axes.set_title(
        "Text held by one rank-1 edit of one prompt token (pale: each seed)",
        fontsize=11,
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.45))
    figure.savefig(directory / "recovered.png", dpi=120)


def print_table(runs: list[Run]) -> None:
    """Print, for each text, layer and length, what each seed gave back."""
    layers = sorted({run["layer"] for run in runs})
    print(f"| text | layer | {' | '.join(f'{n} tokens' for n in LENGTHS)} |")
    print(f"|---|---|{'---|' * len(LENGTHS)}")
    for text, layer in product((OWN, RANDOM), layers):
        cells = [
            " ".join(
                str(run["recovered"])
                for run in runs
                if (run["text"], run["layer"], run["length"]) == (text, layer, length)
            )
            for length in LENGTHS
        ]
        print(f"| {text} | {layer} | {' | '.join(cells)} |")


def write_results(
    texts: list[Text],
    runs: list[Run],
    prompt: list[int],
    base: PreTrainedModel,
    intervention: str,
    directory: Path,
) -> None:
    """Write what was measured, and all that it depends on."""
    packages = ("axolotl-reft", "torch", "transformers", "peft", "pyvene", "pyreft")
    settings = {
        "intervention": intervention,
        "prompt": PROMPT,
        "prompt_tokens": len(prompt),
        "lengths": LENGTHS,
        "seeds": SEEDS,
        "steps_at_most": STEPS,
        "peak_learning_rate": PEAK_LR,
        "trained_numbers": base.config.hidden_size + 1,
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages},
    }
    # One run a line, so that a difference between two measurements can be read.
    lines = ",\n".join(f"    {json.dumps(row)}" for row in runs)
    head = json.dumps({"settings": settings, "texts": texts}, indent=2)
    body = f'{head[:-2]},\n  "runs": [\n{lines}\n  ]\n}}\n'
    (directory / "results.json").write_text(body, encoding="utf-8")


def main() -> None:
    """Measure every layer, length and text; write the results and the plot."""
    parser = argparse.ArgumentParser(description="How much text one edit holds")
    parser.add_argument(
        "--intervention", choices=INTERVENTIONS, default=INTERVENTIONS[0]
    )
    intervention = parser.parse_args().intervention
    # What is committed beside this file is of the default.
    directory = HERE if intervention == INTERVENTIONS[0] else OUTPUTS
    directory.mkdir(parents=True, exist_ok=True)
    # Sums in another order, from another thread count, would give other numbers.
    torch.set_num_threads(1)
    started = time.monotonic()
    base, tokenizer = load_base()
    prompt = tokenizer(PROMPT)["input_ids"]
    letters = tokenizer.convert_tokens_to_ids(list(LETTERS))
    texts: list[Text] = []
    runs: list[Run] = []
    for seed in SEEDS:
        for text, target in make_texts(base, prompt, letters, seed).items():
            texts.append(
                {
                    "text": text,
                    "seed": seed,
                    "tokens": tokenizer.decode(target),
                    "nats_per_token": round(nats_per_token(base, prompt, target), 3),
                    "recovered_without_adapter": recall(base, prompt, target),
                }
            )
            print(f"\n{texts[-1]}", flush=True)
            for layer in range(base.config.num_hidden_layers):
                more = measure(base, prompt, target, text, layer, seed, intervention)
                runs += more
                shown = [run["recovered"] for run in more]
                seconds = time.monotonic() - started
                print(f"layer {layer}  recovered {shown}  {seconds:.0f} s", flush=True)
    write_results(texts, runs, prompt, base, intervention, directory)
    plot(runs, directory)
    print()
    print_table(runs)


if __name__ == "__main__":
    main()
