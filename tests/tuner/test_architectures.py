"""Rows of the sweep over architectures, one for each kind of layers and heads, and the
page that it writes."""

from importlib.metadata import version

import pytest

from axolotl_reft import LoreftConfig
from benchmarks.sweep import subject, table
from benchmarks.sweep.__main__ import main
from benchmarks.sweep.architectures import architectures
from benchmarks.sweep.findings import Row
from benchmarks.sweep.running import check, run

KNOWN = {architecture.name: architecture for architecture in architectures()}
PAGE = table.PAGE.read_text()


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("OPTForCausalLM", "right"),  # its head calls past the base model
        ("MarianForCausalLM", "right"),  # the decoder of an encoder-decoder
        ("Qwen2AudioForConditionalGeneration", "right"),  # towers with equal counts
        ("MllamaForConditionalGeneration", "right"),  # layers that a text passes over
        ("LongformerForMaskedLM", "right"),  # tokens padded inside
        ("BigBirdModel", "right"),  # the same, of a base model
        ("XLNetLMHeadModel", "right"),  # time first
        ("MambaForCausalLM", "right"),  # caches without a length
        ("OpenAIGPTLMHeadModel", "right"),  # layers that return lists
        ("SqueezeBertModel", "refused"),  # width before time, in a dict
        ("DeepseekV4ForCausalLM", "refused"),  # several streams a token
        ("ProphetNetForCausalLM", "refused"),  # several streams in the axis of time
        ("AlbertModel", "refused"),  # one layer that runs several times
    ],
)
def test_an_architecture(name, verdict):
    row = check(KNOWN[name])
    assert row.verdict == verdict, table.why(row)


def test_a_wrong_edit_is_seen(monkeypatch):
    """Of one token more at the end of the prompt."""
    monkeypatch.setattr(
        subject,
        "LoreftConfig",
        lambda positions, rank: LoreftConfig(
            positions=positions.replace("l2", "l3"), rank=rank
        ),
    )
    row = check(KNOWN["LlamaForCausalLM"])
    wrong = {finding.check for finding in row.findings if finding.verdict == "WRONG"}
    assert wrong >= {"one row", "two rows", "left padding", "gradients", "generate"}


def test_a_hang_ends_its_own_row_alone():
    rows: list[Row] = []
    names = ["LlamaForCausalLM", "MistralForCausalLM"]
    found = run([KNOWN[name] for name in names], 1, 0.01, rows.append)
    assert [row.name for row in found] == [row.name for row in rows] == names
    assert {row.verdict for row in found} == {"WRONG"}
    assert table.why(found[0]) == "run not done in time"


def test_the_command_compares_with_the_page(monkeypatch, tmp_path, capsys):
    page = tmp_path / "architectures.md"
    page.write_text("| `AlbertModel` | right |  |  |\n")
    monkeypatch.setattr(table, "PAGE", page)
    assert main(["AlbertModel", "--jobs", "1", "--check"]) == 1
    assert "AlbertModel: refused, and the page has right" in capsys.readouterr().out
    page.write_text("| `AlbertModel` | refused |  |  |\n")
    assert main(["AlbertModel", "--jobs", "1", "--check"]) == 0
    with pytest.raises(SystemExit):
        main(["NobodyForCausalLM"])
    assert "transformers has no NobodyForCausalLM" in capsys.readouterr().err


def test_the_page_has_every_architecture():
    listed = table.verdicts(PAGE)
    assert set(listed.values()) <= {"right", "refused", "not compared", "not built"}
    if table.written_with(PAGE, "transformers") == version("transformers"):
        assert listed.keys() == KNOWN.keys()
