"""``python -m examples.real.score CONFIG``: an adapter's share of right answers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.real.answers import Answer, answers
from examples.real.settings import config_file, read, task_name
from examples.real.tasks import load


@dataclass(frozen=True)
class Scored:
    """The answers to a task's test, of a base or with an adapter.

    Attributes:
        name: the config's, none of the base.
        parameters: trained ones.
        seconds: of training, as axolotl wrote them to its log.
    """

    task: str
    name: str
    answers: Sequence[Answer]
    parameters: int | None = None
    seconds: float | None = None

    @property
    def right(self) -> float:
        return 100 * sum(answer.right for answer in self.answers) / len(self.answers)


def score_base(config: Path) -> Scored:
    """Score the base of a config on its task."""
    settings = read(config)
    task = load(task_name(settings))
    tokenizer = _tokenizer(settings["base_model"])
    given = answers(_base(settings), tokenizer, task, task.test)
    return Scored(task.name, "none", given)


def score_adapter(config: Path) -> Scored:
    """Score the adapter that a config has trained.

    Raises:
        ValueError: there is none.
    """
    from peft import PeftModel

    import axolotl_reft  # noqa: F401  (registers LoReFT with PEFT)

    settings = read(config)
    directory = Path(settings["output_dir"])
    if not (directory / "adapter_config.json").exists():
        raise ValueError(
            f"{directory} has no adapter; train it first: axolotl train {config}"
        )
    task = load(task_name(settings))
    model = PeftModel.from_pretrained(_base(settings), directory, is_trainable=True)
    parameters = model.get_nb_trainable_parameters()[0]
    model.requires_grad_(False)
    given = answers(model, _tokenizer(directory), task, task.test)
    found = re.findall(r"'train_runtime': '([\d.]+)'", _log_of(directory))
    seconds = float(found[-1]) if found else None
    return Scored(task.name, config.stem, given, parameters, seconds)


def table(rows: Sequence[Scored]) -> str:
    """Return a Markdown table."""
    lines = ["| task | adapter | parameters | right answers | training |"]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        parameters = "" if row.parameters is None else f"{row.parameters:,}"
        seconds = "" if row.seconds is None else f"{row.seconds:.0f} s"
        cells = [row.task, row.name, parameters, f"{row.right:.1f} %", seconds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def examples(rows: Sequence[Scored], count: int) -> str:
    """Return what each row answered to a task's first questions."""
    lines = list[str]()
    width = max(len(row.name) for row in rows)
    for n in range(count):
        asked = rows[0].answers[n]
        lines += ["", asked.question, f"  {'expected':<{width}}  {asked.expected}"]
        for row in rows:
            given = " ".join(row.answers[n].generated.split())
            mark = "" if row.answers[n].right else "   (wrong)"
            lines.append(f"  {row.name:<{width}}  {given}{mark}")
    return "\n".join(lines)


def _base(settings: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    base = AutoModelForCausalLM.from_pretrained(settings["base_model"], dtype=dtype)
    return base.to("cuda" if torch.cuda.is_available() else "cpu")


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def _log_of(directory: Path) -> str:
    log = directory / "debug.log"
    return log.read_text(encoding="utf-8") if log.exists() else ""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.real.score",
        description="Score the adapters that axolotl has trained with these configs, "
        "and their base: the share of right answers to the held-out questions of the "
        "task.",
    )
    parser.add_argument("config", nargs="+", type=config_file)
    parser.add_argument(
        "--shown", type=int, default=3, metavar="N", help="questions to show"
    )
    options = parser.parse_args(arguments)
    report(options.config, options.shown)


def report(configs: Sequence[Path], shown: int) -> None:
    """Print a table of a base and its adapters, with answers to a few questions.

    Raises:
        ValueError: the configs have several bases or tasks.
    """
    kinds = {(read(path)["base_model"], task_name(read(path))) for path in configs}
    if len(kinds) > 1:
        listed = "; ".join(f"{task} on {base}" for base, task in sorted(kinds))
        raise ValueError(
            f"the configs are of several tasks or bases ({listed}); score each alone"
        )
    print("Asking the held-out questions, without an adapter first.", flush=True)
    rows = [score_base(configs[0])]
    for config in configs:
        rows.append(score_adapter(config))
    print(f"{examples(rows, shown)}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
