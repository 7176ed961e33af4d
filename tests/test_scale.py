"""The sums of benchmarks/scale.py against models that are built, and counted runs."""

import pytest
import torch
from documents import ROOT
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_reft.core.affine import affine_stack
from axolotl_reft.core.interventions import LoreftIntervention
from axolotl_reft.core.scatter import EditIndices
from axolotl_reft.core.stacked_edits import StackedEdits
from benchmarks import scale
from benchmarks.base import Setting, build_base, rectangle
from benchmarks.contestants import CONTESTANTS, our_config
from benchmarks.scale import LLAMAS, Shape, Step
from benchmarks.tasks import Operations

SETTING = Setting(
    hidden_size=64, layers=4, rank=2, first=3, last=3, batch=2, length=24, prompt=12
)


@pytest.mark.parametrize("name", LLAMAS)
def test_a_base_has_as_many_numbers_as_on_paper(name):
    shape = LLAMAS[name]
    config = LlamaConfig(
        hidden_size=shape.d,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == shape.numbers


def test_an_adapter_has_as_many_numbers_as_on_paper():
    shape, step = scale._of(SETTING)
    model = get_peft_model(build_base(SETTING), our_config(SETTING))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == scale.loreft_numbers(shape, step.rank)
    held = [t for name, t in model.state_dict().items() if ".intv_" in name]
    assert sum(t.nbytes for t in held) == scale.loreft_bytes(shape, step.rank)
    lora = CONTESTANTS["lora"](build_base(SETTING), SETTING)
    assert sum(p.numel() for p in lora.trained) == scale.lora_numbers(shape, step.rank)


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_an_edit_costs_what_it_costs_on_paper():
    intervention = LoreftIntervention(embed_dim=96, low_rank_dimension=4)
    hidden = torch.randn(10, 96, requires_grad=True)
    got = counted(lambda: intervention(hidden).sum().backward())
    assert got == scale.edit_flops(96, 4, 10)


def test_a_layer_asks_for_as_many_operations_as_the_page_says():
    both = [LoreftIntervention(embed_dim=96, low_rank_dimension=4) for _ in range(2)]
    hidden = torch.randn(2, 40, 96, requires_grad=True)
    indices = EditIndices((torch.arange(5), torch.arange(5, 9)))
    with Operations() as operations:
        edited = StackedEdits(affine_stack(both), 1).edit(0, hidden, indices)
        edited.backward(torch.ones_like(edited))
    page = (ROOT / "docs" / "performance.md").read_text()
    assert f"small operations: {len(operations.names)} for the two sides" in page


def training_flops(name, setting):
    base = build_base(setting)
    base.set_attn_implementation("eager")
    contestant = CONTESTANTS[name](base, setting)
    batch = contestant.collate(rectangle(setting))
    return counted(lambda: contestant.loss(batch).backward())


@pytest.mark.parametrize(("edited", "layers"), [("all", 4), ("upper", 2), ("last", 1)])
def test_the_floor_costs_what_it_costs_on_paper(edited, layers):
    got = training_flops("floor", SETTING.but(edited=edited))
    # transformers computes a row's rotary angles by a product; a head is as wide as d.
    got -= 2 * SETTING.length * SETTING.hidden_size // 2
    assert got == scale.floor_flops(*scale._of(SETTING), layers)


@pytest.mark.parametrize("name", ["ours", "lora"])
def test_an_adapter_adds_what_it_adds_on_paper(name):
    added = {"ours": scale.loreft_flops, "lora": scale.lora_flops}[name]
    got = training_flops(name, SETTING) - training_flops("floor", SETTING)
    assert got == added(*scale._of(SETTING))


def test_logits_of_labelled_tokens_save_what_they_save_on_paper():
    saved = training_flops("ours", SETTING) - training_flops("labelled", SETTING)
    shape, step = scale._of(SETTING)
    # Of 24 tokens a row 12 have labels, and 16 are kept, a multiple of eight.
    assert saved == scale.head_flops(shape, step.samples * 8)
    assert scale.head_flops(shape, step.tokens) == 3 * saved


def test_the_page_shows_these_tables():
    page = (ROOT / "docs" / "performance.md").read_text()
    for table in scale.tables().split("\n\n"):
        assert table in page, "copy the tables of python -m benchmarks scale"


def test_a_tied_head_is_counted_once():
    shape = Shape(64, 2, 128, 4, 2, vocabulary=10)
    tied = Shape(64, 2, 128, 4, 2, vocabulary=10, tied=True)
    assert shape.numbers - tied.numbers == 640
    assert Step(2, 8).tokens == 16
