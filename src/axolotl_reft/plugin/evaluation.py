"""``axolotl reft lm-eval``: score a trained adapter on tasks of lm_eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from axolotl.cli.config import load_cfg
from axolotl.cli.utils import load_model_and_tokenizer
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager, get_task_dict
from lm_eval.utils import handle_non_serializable

from axolotl_reft.lm_eval import LoreftLM, check_rolling
from axolotl_reft.plugin.plugin import trained_adapter
from axolotl_reft.saved.directory import read_adapter_config


def evaluate_tasks(
    source: str,
    tasks: list[str],
    include_path: str | None,
    output: str | None,
    batch_size: str,
    **settings: Any,
) -> dict[str, Any]:
    """Score an adapter; whatever is wrong is found before the base model loads.

    Args:
        source: axolotl's YAML, whose model is loaded as by ``axolotl inference``, or a
            directory with an adapter, whose base is loaded as by lm_eval.
        tasks: names of tasks or groups; empty for the config's ``lm_eval_tasks``.
        settings: passed to ``lm_eval.simple_evaluate``, whose results are returned.
    """
    if output and Path(output).exists():
        raise ValueError(f"--output: {output!r} exists already; name another file")
    directory = source if Path(source).is_dir() else None
    if not tasks and directory is None:
        # Validation drops them without axolotl's own plugin.
        written = yaml.safe_load(Path(source).read_text()) or {}
        tasks = written.get("lm_eval_tasks") or []
    if not tasks:
        raise ValueError("--tasks: name at least one task of lm_eval")
    manager = TaskManager(include_path=include_path)
    for name in tasks:
        if not manager.match_tasks([name]):
            raise ValueError(
                f"--tasks: lm_eval knows no task {name!r}; see lm_eval ls tasks, or "
                "give the directory of your own with --include-path"
            )
    cfg = None
    if directory is None:
        cfg = load_cfg(source, inference=True, rl=None)
        if cfg.adapter != "loreft":
            raise ValueError(
                f"adapter: {cfg.adapter!r} is not loreft; use axolotl lm-eval"
            )
        directory = cfg.lora_model_dir or trained_adapter(cfg.output_dir)
    _check_tasks(tasks, manager, read_adapter_config(directory, source).positions)
    if cfg is None:
        model = LoreftLM(peft=directory, batch_size=batch_size)
    else:
        loaded, tokenizer, _ = load_model_and_tokenizer(cfg=cfg, inference=True)
        model = LoreftLM(loaded, tokenizer=tokenizer, batch_size=batch_size)
    results = simple_evaluate(
        model, tasks=tasks, task_manager=manager, log_samples=False, **settings
    )
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=2, default=handle_non_serializable)
        Path(output).write_text(text)
    return results


def _check_tasks(tasks: list[str], manager: TaskManager, positions: str) -> None:
    groups = [get_task_dict(tasks, manager)]
    while groups:
        for task in groups.pop().values():
            if isinstance(task, dict):
                groups.append(task)
            elif task.OUTPUT_TYPE == "loglikelihood_rolling":
                check_rolling(positions)
