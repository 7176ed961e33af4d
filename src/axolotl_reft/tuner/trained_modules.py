"""Modules trained whole and saved with the adapter: PEFT's ``modules_to_save``.

PEFT copies a module, trains the copy and saves it. It leaves open which modules a name
means, embeddings that the head shares, a base whose vocabulary had grown when the
adapter was trained, and how often a matrix is saved.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from peft import peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from axolotl_reft.errors import did_you_mean
from axolotl_reft.tuner.config import LOREFT, LoreftConfig

# PEFT adds a classifier's heads by these names, whichever the model has.
HEADS = ("classifier", "score")
# Where PEFT's wrapper keeps the trained copy and the base's own module.
WRAPPED_PARTS = ("modules_to_save", "original_module")


def check_modules_to_save(config: LoreftConfig, model: nn.Module, layers: str) -> None:
    """Raise ValueError for a name of no module, or of one within the decoder layers,
    whose list is at the path ``layers``."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    for name in config.modules_to_save or ():
        matched = [path for path in paths if path.endswith(name)]  # as PEFT matches
        if not matched and name not in HEADS:
            leaves = sorted({path.rpartition(".")[2] for path in paths if path})
            raise ValueError(
                f"modules_to_save: {name!r} is not a module of "
                f"{type(model).__name__}.{did_you_mean(name, tuple(leaves))}"
            )
        within = [path for path in matched if f"{path}.".startswith(f"{layers}.")]
        if within:
            raise ValueError(
                f"modules_to_save: {name!r} matches {within[0]!r}, within the layers "
                "that LoReFT edits; name modules outside of them, such as "
                "embed_tokens, lm_head or model.norm"
            )


def tie_trained_embeddings(
    config: LoreftConfig, model: PreTrainedModel, tied: list[str]
) -> None:
    """Let a head that is tied to the embeddings share the trained copy too; changes the
    config in place."""
    named, names = set(config.modules_to_save or ()), _embedding_names(model)
    if tied and named & set(names):
        config.modules_to_tie = set(tied)
        config.modules_to_save = sorted(named - set(names) | {names[0]})


def fit_vocabulary(config: LoreftConfig, model: PreTrainedModel) -> None:
    """Note how many rows the trained embeddings have; give a plain base as many, which
    the saved ones replace."""
    named = set(config.modules_to_save or ())
    if not named or not named & set(_embedding_names(model)):
        return
    rows = model.get_input_embeddings().num_embeddings
    if config.vocab_size is None:
        config.vocab_size = rows
    elif config.vocab_size != rows:
        model.resize_token_embeddings(config.vocab_size, mean_resizing=False)


def _embedding_names(model: PreTrainedModel) -> list[str]:
    """Return names such as ``embed_tokens`` and ``lm_head``."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {id(module): path for path, module in model.named_modules()}
    return [names[id(m)].rpartition(".")[2] for m in modules if id(m) in names]


def save_modules_once() -> None:
    """Have PEFT save a trained module once.

    Where the vocabulary has grown, it saves the trained copy as the module itself,
    which is what it reads, the copy once more, and the base's own.
    """
    collect = peft_model.get_peft_model_state_dict

    @wraps(collect)
    def collect_once(
        model: Any, state_dict: Any = None, adapter_name: str = "default", **kwargs: Any
    ) -> dict[str, Tensor]:
        found = collect(model, state_dict, adapter_name, **kwargs)
        if model.peft_config[adapter_name].peft_type != LOREFT:
            return found
        twice = tuple(f".{part}." for part in WRAPPED_PARTS)
        return {k: t for k, t in found.items() if not any(part in k for part in twice)}

    # Patch: PEFT has no hook for what it collects.
    peft_model.get_peft_model_state_dict = collect_once


def same_modules(a: list[str] | None, b: list[str] | None, tied: list[str]) -> bool:
    """Whether two settings train the same modules, with these names for one module."""

    def distinct(names: list[str] | None) -> set[str]:
        kept = set(names or ()) - set(HEADS)
        return kept - set(tied[1:]) | set(tied[:1] if kept & set(tied) else ())

    return distinct(a) == distinct(b)
