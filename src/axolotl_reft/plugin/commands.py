"""``axolotl reft``: the package's commands in axolotl's command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any

import click

from axolotl_reft.settings.spec import INTERVENTIONS


@click.group()
def reft() -> None:
    """Inspect LoReFT adapters, score them, and exchange them with pyreft."""


def _plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """End a user's mistake with one line instead of a traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ValueError as error:
            raise click.ClickException(str(error)) from error

    return wrapped


@reft.command("export")
@click.argument("directory", metavar="DIR")
@click.argument("out", metavar="OUT")
@_plain_errors
def export_command(directory: str, out: str) -> None:
    """Write the adapter in DIR to OUT in pyreft's format.

    OUT is what ReftModel.save would write, with adapter_config.json beside it, from
    which `axolotl reft import` reads what pyreft does not store.
    """
    from axolotl_reft.exchange.directory import export_adapter

    by_path = export_adapter(directory, out)
    remedy = f"; load it with pyreft.ReftModel.load({out!r}, base_model)"
    if by_path:
        remedy = (
            ". pyreft 0.1.0 cannot load a component that is given by its path "
            f"({by_path}), its own adapters included; axolotl reft import can"
        )
    click.echo(f"wrote {out}{remedy}")


@reft.command("import")
@click.argument("directory", metavar="DIR")
@click.argument("out", metavar="OUT")
@click.option(
    "--base-model",
    help="Path or hub id of the base model, of which only the config is read; default: "
    "the one that an export names.",
)
@click.option("--positions", help="What it was trained with, for example f7+l7.")
@click.option(
    "--intervention",
    type=click.Choice(INTERVENTIONS),
    help="Its kind, where DIR does not tell.",
)
@click.option(
    "--component",
    help="What it edits, where DIR does not tell, for example mlp.down_proj.output.",
)
@click.option("--dropout", type=float, help="What it was trained with; default 0.")
@click.option("--act-fn", help="What it was trained with; default linear.")
@_plain_errors
def import_command(directory: str, out: str, **settings: Any) -> None:
    """Write pyreft's adapter in DIR to OUT as a PEFT adapter.

    DIR is what ReftModel.save wrote, or a checkpoint of pyreft's trainer. pyreft does
    not store positions, dropout and activation; pass those it was trained with.
    """
    from axolotl_reft.exchange.directory import import_adapter

    import_adapter(directory, out, **settings)
    click.echo(
        f"wrote {out}; load it with peft.PeftModel.from_pretrained(base, {out!r})"
    )


@reft.command("lm-eval")
@click.argument("source", metavar="CONFIG_OR_DIR", type=click.Path(exists=True))
@click.option(
    "--tasks", help="Names of lm_eval's tasks or groups, with commas between."
)
@click.option("--include-path", help="A directory of further tasks.")
@click.option("--num-fewshot", type=int, help="Examples in each context.")
@click.option("--limit", type=float, help="Samples of each task, or a part below 1.")
@click.option("--batch-size", default="8", show_default=True, help="Or auto.")
@click.option("--apply-chat-template", is_flag=True, help="The tokenizer's.")
@click.option("--output", help="A JSON file for the results.")
@_plain_errors
def lm_eval_command(source: str, tasks: str | None, **settings: Any) -> None:
    """Score a trained adapter on tasks of lm_eval.

    CONFIG_OR_DIR is axolotl's config, whose adapter in output_dir (or lora_model_dir)
    is taken, or a directory with an adapter. Every request's context is its prompt.
    """
    if find_spec("lm_eval") is None:
        raise ValueError(
            "axolotl reft lm-eval needs lm_eval, which is not installed; pip install "
            "'axolotl-reft[eval]'"
        )
    from lm_eval.utils import make_table

    from axolotl_reft.plugin.evaluation import evaluate_tasks

    names = tuple(name for name in (tasks or "").split(",") if name)
    results = evaluate_tasks(source, names, **settings)
    click.echo(make_table(results))
    if "groups" in results:
        click.echo(make_table(results, "groups"))


@reft.command("config-schema")
def config_schema_command() -> None:
    """Print the JSON schema of the loreft: block.

    `axolotl config-schema` knows axolotl's own settings alone.
    """
    from axolotl_reft.plugin.args import LoreftBlock

    click.echo(json.dumps(LoreftBlock.model_json_schema(), indent=2))


@reft.command("inspect")
@click.argument("directory", metavar="DIR")
@click.option("--prompt", "prompts", multiple=True, help="A prompt; can be repeated.")
@click.option("--prompts-file", help="A file with one prompt a line, text or JSON.")
@click.option(
    "--sample",
    type=click.IntRange(1, 1000),
    help="How many prompts to draw from the file; default: all.",
)
@click.option("--chat", is_flag=True, help="Put prompts into the chat template.")
@click.option(
    "--base-model", help="Path or hub id; default: the one that the adapter names."
)
@click.option("--device", default="cpu", show_default=True, help="Where to run it.")
@click.option("--with", "other", metavar="OTHER_DIR", help="Compare with this adapter.")
@click.option("--plot", metavar="FILE", help="Also draw it: .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@_plain_errors
def inspect_command(directory: str, **options: Any) -> None:
    """Show what the adapter in DIR is, which tokens it edits, and by how much.

    The base model is loaded only when there are prompts to run, with --prompt or
    --prompts-file; the rest is read from DIR's files.
    """
    from axolotl_reft.inspect.command import run

    run(directory, **options)
