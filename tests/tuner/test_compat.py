"""Releases of transformers and PEFT, and what differs between them."""

import importlib
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import build_adapter, build_model
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from axolotl_reft.tuner.compat import SUPPORTED, cache_of, pages_of

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.mark.parametrize(
    ("package", "found"),
    [
        ("transformers", "5.16.0"),
        ("transformers", "5.25.0"),
        ("transformers", "5.25.0.dev0"),
        ("peft", "0.19.1"),
        ("peft", "0.22.0"),
    ],
)
def test_other_releases_are_refused_where_the_tuner_is_imported(
    package, found, monkeypatch
):
    for name in list(sys.modules):
        if name.startswith("axolotl_reft"):
            monkeypatch.delitem(sys.modules, name)
    version = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: found if name == package else version(name)
    )
    wanted = f"{package}{SUPPORTED[package]}"
    message = (
        f"axolotl-reft needs {wanted}, and {found} is installed; run: "
        f"pip install '{wanted}'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        importlib.import_module("axolotl_reft")


@pytest.mark.parametrize("package", list(SUPPORTED))
def test_what_is_checked_is_what_is_declared(package):
    declared = re.findall(rf'"{package}([<>=][^"]*)"', PYPROJECT.read_text())
    assert declared == [SUPPORTED[package]]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_by_either_name(name):
    cache = DynamicCache()
    assert cache_of({"input_ids": torch.zeros(1, 1), name: cache}) is cache
    assert pages_of({name: cache}) is None


def test_a_cache_is_found_in_outputs():
    cache, hidden = DynamicCache(), torch.zeros(1, 1, 2)
    # transformers 5.24 takes the old name in a constructor, too.
    output = BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)
    assert cache_of(output) is cache_of(output.to_tuple()) is cache
    assert cache_of(BaseModelOutputWithPast(last_hidden_state=hidden)) is None
    assert cache_of(hidden) is None


def test_pages_of_continuous_batching_are_no_cache():
    pages = object()
    assert cache_of({"cache": pages}) is None
    assert pages_of({"cache": pages}) is pages


@torch.no_grad()
def test_generates_logits_are_those_of_a_training_forward(tokens):
    model = build_adapter(build_model())
    ids = tokens(1, 12)
    answer = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6,
        do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    labels = answer.sequences.clone()
    labels[:, :12] = -100
    trained = model(answer.sequences, labels=labels, use_cache=False).logits
    got = torch.stack(answer.logits, 1)
    assert torch.allclose(got, trained[:, 11:-1], atol=1e-5)
