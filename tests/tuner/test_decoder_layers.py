"""Which list of modules is the text model's layers."""

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from axolotl_reft.tuner.model import find_decoder_layers

COUNTS = ("num_hidden_layers", "num_layers", "depth", "encoder_layers", "n_layers")
COUNTS += ("decoder_layers", "depths")


def build(name, layers=3):
    """A model without weights, whose towers all have so many layers."""
    model = getattr(transformers, name)
    config = model.config_class()
    for part in [config, *vars(config).values()]:
        if isinstance(part, PreTrainedConfig):
            for count in COUNTS:
                if isinstance(getattr(part, count, None), int):
                    setattr(part, count, layers)
    config.cross_layer_interval = 1  # Idefics'
    with torch.device("meta"):
        return model(config)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("AudioFlamingo3ForConditionalGeneration", "model.language_model.layers"),
        ("Blip2ForConditionalGeneration", "language_model.model.decoder.layers"),
        ("BlipForConditionalGeneration", "text_decoder.bert.encoder.layer"),
        ("CLIPModel", "text_model.encoder.layers"),
        ("FuyuForCausalLM", "model.language_model.layers"),
        ("Gemma3ForConditionalGeneration", "model.language_model.layers"),
        ("GraniteSpeechForConditionalGeneration", "model.language_model.layers"),
        ("IdeficsForVisionText2Text", "model.layers"),
        ("Idefics2ForConditionalGeneration", "model.text_model.layers"),
        ("InstructBlipForConditionalGeneration", "language_model.model.decoder.layers"),
        ("Kosmos2ForConditionalGeneration", "text_model.model.layers"),
        ("LlavaForConditionalGeneration", "model.language_model.layers"),
        ("MllamaForConditionalGeneration", "model.language_model.layers"),
        ("Qwen2AudioForConditionalGeneration", "model.language_model.layers"),
        ("Qwen2VLForConditionalGeneration", "model.language_model.layers"),
        ("Qwen2_5_VLForConditionalGeneration", "model.language_model.layers"),
        ("Qwen3VLForConditionalGeneration", "model.language_model.layers"),
        ("VoxtralForConditionalGeneration", "model.language_model.layers"),
    ],
)
def test_towers_of_one_depth(name, path):
    found, layers = find_decoder_layers(build(name))
    assert found == path
    assert len(layers) == 3


@pytest.mark.parametrize("name", ["XLMModel", "FlaubertWithLMHeadModel"])
def test_lists_of_parts_of_layers_are_refused(name):
    message = "found no list of 3 layers.*but.*attentions.*layer_norm1.*ffns.*use a"
    with pytest.raises(ValueError, match=message):
        find_decoder_layers(build(name))


def test_as_many_experts_as_layers_are_not_layers():
    model = build("MistralForCausalLM")
    model.model.layers[0].experts = nn.ModuleList(nn.Identity() for _ in range(3))
    del model.model.layers[2]
    with pytest.raises(ValueError, match="found no list of 3 layers"):
        find_decoder_layers(model)


def test_lists_beside_the_layers_are_passed_over():
    """Of norms, or projections for each layer, by names that come first."""
    model = build("MistralForCausalLM")
    model.model.h = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    assert find_decoder_layers(model)[0] == "model.layers"
