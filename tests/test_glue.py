"""The GLUE example, on its tiny base, and the numbers in its header."""

from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
import torch
from documents import ROOT
from peft import PeftModel, get_peft_model
from transformers import RobertaConfig, RobertaForSequenceClassification

from axolotl_reft import LoreftConfig

SCRIPT = ROOT / "examples" / "glue" / "classify.py"


@pytest.fixture(scope="module")
def example():
    spec = spec_from_file_location("classify", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tiny_task_is_learned_and_its_adapter_answers_alike(example, tmp_path):
    options = ["--tiny", "--output", str(tmp_path), "--learning-rate", "0.02"]
    settings = ["--epochs", "4", "--rank", "4", "--positions", "f3"]
    figures = example.main(options + settings)
    assert figures["eval_accuracy"] > 0.85
    example.set_seed(example.SEED)
    tokenizer = example.tiny_tokenizer()
    base = example.tiny_base(tokenizer)
    model = PeftModel.from_pretrained(base, tmp_path).eval()
    rows = example.tiny_data()["validation"]
    inputs = tokenizer(rows["sentence"][:], padding=True, return_tensors="pt")
    with torch.no_grad():
        given = model(**inputs).logits.argmax(-1).numpy()
    assert (given == np.array(rows["label"])).mean() == figures["eval_accuracy"]


def test_the_correlation_of_classes_is_matthews(example):
    truth = np.array([0.0, 0, 0, 1, 1, 1])
    given = np.array([0.0, 0, 1, 1, 1, 1])
    # (3 · 2 − 1 · 0) / √((3 + 1)(3 + 0)(2 + 1)(2 + 0))
    assert example.correlation(truth, given) == pytest.approx(6 / 72**0.5)
    assert example.correlation(truth, np.zeros(6)) == 0


def test_its_header_has_the_counts_of_roberta_base():
    # As in the hub's config.json, with two labels.
    with torch.device("meta"):
        config = RobertaConfig(
            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1
        )
        base = RobertaForSequenceClassification(config)
    total = base.num_parameters()
    settings = LoreftConfig(task_type="SEQ_CLS", positions="f3", rank=1)
    count, _ = get_peft_model(base, settings).get_nb_trainable_parameters()
    header = " ".join(SCRIPT.read_text().split('"""')[1].split())
    edits = 12 * (2 * 768 + 1)
    assert f"{edits:,} = 12 layers" in header
    assert f"{count - edits:,} of the classifier's head" in header
    assert f"{total * 4 / 1e9:.1f} GB in float32 ({total:,} × 4 bytes)" in header
