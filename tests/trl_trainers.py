"""TRL's trainers on a tiny model, made as a user makes them, without axolotl."""

import importlib
import random
from pathlib import Path

import trl
from conftest import build_adapter, build_model
from datasets import Dataset
from workspace import build_tokenizer

from axolotl_reft import LoreftConfig

POSITIONS = {"positions": "f2+l3", "rank": 4, "tied_weights": False}
_SAMPLING = {"num_generations": 4, "max_completion_length": 4, "temperature": 1.0}
# By name, a trainer's module and class in TRL, its data, and its settings.
TRAINERS = {
    "sft": ("SFT", "completion", {"loss_type": "nll"}),
    "dft": ("SFT", "completion", {"loss_type": "dft"}),
    "smoothed": (
        "SFT",
        "completion",
        {"loss_type": "nll", "label_smoothing_factor": 0.1},
    ),
    "assistant": (
        "SFT",
        "messages",
        {"loss_type": "dft", "assistant_only_loss": True},
    ),
    "dpo": ("DPO", "pair", {"beta": 0.5}),
    "kto": ("KTO", "labelled", {"beta": 0.5}),
    "grpo": ("GRPO", "prompt", {"beta": 0.04, "num_iterations": 2, **_SAMPLING}),
    "rloo": ("RLOO", "prompt", {"beta": 0.04, **_SAMPLING}),
    "orpo": ("experimental.orpo.ORPO", "pair", {}),
    "cpo": ("experimental.cpo.CPO", "pair", {}),
    "bco": ("experimental.bco.BCO", "labelled", {}),
    "tpo": ("experimental.tpo.TPO", "triple", {}),
    "gmpo": ("experimental.gmpo.GMPO", "prompt", {"beta": 0.04, **_SAMPLING}),
    "ssd": (
        "experimental.ssd.SSD",
        "prompt",
        {"max_completion_length": 4, "filter_empty": False},
    ),
    "gkd": (
        "experimental.gkd.GKD",
        "messages",
        {"loss_type": "nll", "max_new_tokens": 4},
    ),
    "online_dpo": (
        "experimental.online_dpo.OnlineDPO",
        "prompt",
        {"max_new_tokens": 4},
    ),
}
_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %} {% endfor %}"
)


def rewards(completions: list[str], **_: object) -> list[float]:
    return [
        completion.count("m") / 4 + len(completion) / 9 for completion in completions
    ]


def build_rows(kind: str, count: int = 8) -> Dataset:
    """Prompts and answers of ragged lengths; every prompt ends with a colon."""
    rng = random.Random(0)
    rows = []
    for number in range(count):
        prompt = " ".join(rng.sample("abcdefghijkl", rng.randint(3, 9))) + " :"
        answers = [" " + " ".join(c * rng.randint(1, 4)) for c in "mno"]
        answer, roles = answers[number % 2], ("user", "assistant")
        turns = zip(roles, (prompt, answer), strict=True)
        rows.append(
            {
                "prompt": {},
                "completion": {"completion": answer},
                "labelled": {"completion": answer, "label": number % 2 == 0},
                "pair": {"chosen": answers[0], "rejected": answers[1]},
                "triple": dict(
                    zip(("chosen", "rejected", "reference"), answers, strict=True)
                ),
                "messages": {
                    "messages": [
                        {"role": r, "content": text.strip()} for r, text in turns
                    ]
                },
            }[kind]
            | ({} if kind == "messages" else {"prompt": prompt})
        )
    return Dataset.from_list(rows)


def build_trainer(
    name: str, directory: Path, loaded: bool = False, **changes: object
) -> object:
    """A trainer that makes the adapter itself, or is given a model with one."""
    path, kind, settings = TRAINERS[name]
    *modules, prefix = path.split(".")
    module = importlib.import_module(".".join([trl.__name__, *modules]))
    tokenizer = build_tokenizer()
    tokenizer.chat_template = _TEMPLATE
    base = build_model(vocab_size=len(tokenizer), eos_token_id=2)
    adapter = {
        k: changes.pop(k) for k in list(changes) if k in ("dropout", "positions")
    }
    adapter = POSITIONS | adapter
    if loaded:
        given = {"model": build_adapter(base, **adapter)}
    else:
        config = LoreftConfig(task_type="CAUSAL_LM", **adapter)
        given = {"model": base, "peft_config": config}
    if kind == "prompt" and name != "ssd":
        given["reward_funcs"] = rewards
    if name == "gkd":
        given["teacher_model"] = build_model(vocab_size=len(tokenizer), eos_token_id=2)
    defaults = {
        "output_dir": str(directory), "report_to": [], "use_cpu": True, "bf16": False,
        "max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no",
        "learning_rate": 0.0, "disable_tqdm": True, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    arguments = getattr(module, f"{prefix}Config")(**defaults | settings | changes)
    return getattr(module, f"{prefix}Trainer")(
        args=arguments,
        train_dataset=build_rows(kind),
        eval_dataset=build_rows(kind, 4),
        processing_class=tokenizer,
        **given,
    )
