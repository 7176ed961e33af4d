"""``axolotl reft``: the package's commands in axolotl's command line."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import click

from axolotl_reft.settings.spec import INTERVENTIONS


class _PlainErrors(click.Group):
    """Ends a user's mistake with one line instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_PlainErrors)
def reft() -> None:
    """Find settings for LoReFT, inspect adapters, score and exchange them."""


@reft.command("export")
@click.argument("directory", metavar="DIR")
@click.argument("out", metavar="OUT")
def export_command(directory: str, out: str) -> None:
    """Write the adapter in DIR to OUT in pyreft's format.

    OUT is what ReftModel.save would write, with adapter_config.json beside it, from
    which `axolotl reft import` reads what pyreft does not store.
    """
    from axolotl_reft.exchange.directory import export_adapter

    path = export_adapter(directory, out)
    how = f"load it with pyreft.ReftModel.load({out!r}, base_model)"
    if path:
        how = f"pyreft 0.1.0 cannot load a component that is given by its path ({path})"
    click.echo(f"wrote {out}; {how}")


@reft.command("import")
@click.argument("directory", metavar="DIR")
@click.argument("out", metavar="OUT")
@click.option("--base-model", help="Path or hub id; default: as an export names it.")
@click.option("--positions", help="What it was trained with, for example f7+l7.")
@click.option(
    "--intervention", type=click.Choice(INTERVENTIONS), help="If DIR does not tell it."
)
@click.option("--component", help="If DIR does not tell it: mlp.down_proj.output, ...")
@click.option("--dropout", type=float, help="What it was trained with; default 0.")
@click.option("--act-fn", help="What it was trained with; default linear.")
def import_command(directory: str, out: str, **settings: Any) -> None:
    """Write pyreft's adapter in DIR to OUT as a PEFT adapter.

    DIR is what ReftModel.save wrote, or a checkpoint of pyreft's trainer. pyreft does
    not store positions, dropout and activation; pass those it was trained with.
    """
    from axolotl_reft.exchange.live import import_adapter

    import_adapter(directory, out, **settings)
    click.echo(
        f"wrote {out}; load it with peft.PeftModel.from_pretrained(base, {out!r})"
    )


@reft.command("lm-eval")
@click.argument("source", metavar="CONFIG_OR_DIR", type=click.Path(exists=True))
@click.option("--tasks", help="Tasks or groups of lm_eval, with commas between.")
@click.option("--include-path", help="A directory of further tasks.")
@click.option("--num-fewshot", type=int, help="Examples in each context.")
@click.option("--limit", type=float, help="Samples of each task, or a part below 1.")
@click.option("--batch-size", default="8", show_default=True, help="Or auto.")
@click.option("--apply-chat-template", is_flag=True, help="The tokenizer's.")
@click.option("--output", help="A JSON file for the results.")
def lm_eval_command(source: str, tasks: str | None, **settings: Any) -> None:
    """Score a trained adapter on tasks of lm_eval.

    CONFIG_OR_DIR is axolotl's config, whose adapter in output_dir (or lora_model_dir)
    is taken, or a directory with an adapter. Every request's context is its prompt.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("lm_eval is not installed; pip install 'axolotl-reft[eval]'")
    from lm_eval.utils import make_table

    from axolotl_reft.plugin.evaluation import evaluate_tasks

    names = [name for name in (tasks or "").split(",") if name]
    results = evaluate_tasks(source, names, **settings)
    click.echo(make_table(results))
    if "groups" in results:
        click.echo(make_table(results, "groups"))


@reft.command("config-schema")
def config_schema_command() -> None:
    """Print the JSON schema of the loreft: block."""
    from axolotl_reft.plugin.args import LoreftBlock

    click.echo(json.dumps(LoreftBlock.model_json_schema(), indent=2))


@reft.command("inspect")
@click.argument("directory", metavar="DIR")
@click.option("--prompt", "prompts", multiple=True, help="A prompt; can be repeated.")
@click.option("--prompts-file", help="A file with one prompt a line, text or JSON.")
@click.option("--sample", type=click.IntRange(1, 1000), help="How many of them.")
@click.option("--chat", is_flag=True, help="Put prompts into the chat template.")
@click.option("--base-model", help="Path or hub id; default: as the adapter names it.")
@click.option("--device", default="cpu", show_default=True, help="Where to run it.")
@click.option("--with", "other", metavar="OTHER_DIR", help="Compare with this adapter.")
@click.option("--plot", metavar="FILE", help="Also draw it: .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def inspect_command(directory: str, **options: Any) -> None:
    """Show what the adapter in DIR is, which tokens it edits, and by how much.

    The base model is loaded only to run prompts (--prompt, --prompts-file).
    """
    from axolotl_reft.inspect.command import run

    run(directory, **options)


@reft.command("compare")
@click.argument("directories", metavar="DIR...", nargs=-1, required=True)
@click.option("--sort", metavar="COLUMN", help="Default: eval_loss, else the loss.")
@click.option("--plot", metavar="FILE", help="Also draw it: .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def compare_command(directories: tuple[str, ...], **options: Any) -> None:
    """Compare what trainings gave: settings, losses, scores, sizes of edits, time.

    A DIR is a training's output_dir, a checkpoint, or a directory of trainings, such as
    a sweep's. LoRA's are read as well.
    """
    from axolotl_reft.compare.command import run

    run(directories, **options)


@reft.command("sweep")
@click.argument("config", metavar="CONFIG", type=click.Path(exists=True))
@click.argument("sweep", metavar="SWEEP", type=click.Path(exists=True))
@click.option(
    "--launcher",
    type=click.Choice(["python", "accelerate", "torchrun"]),
    default="python",
    show_default=True,
    help="python: in one process where it can be, the others: each run in its own.",
)
def sweep_command(config: str, sweep: str, launcher: str) -> None:
    """Train CONFIG with every combination of the settings in SWEEP, and compare them.

    SWEEP is a file such as `axolotl train --sweep` takes, in which keys of the loreft:
    block can be swept too. A run that has finished is not trained again.
    """
    from axolotl_reft.plugin.sweep import run_sweep

    run_sweep(config, sweep, launcher)
