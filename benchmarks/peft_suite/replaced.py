"""The lists by which PEFT parametrises its tests, and what stands in their place."""

from __future__ import annotations

from typing import Any

import pytest

from axolotl_reft import LoreftConfig
from benchmarks.peft_suite.models import DECODERS

VARIANTS = {"tied": True, "untied": False}


def _rows(*before: str, settings: tuple[dict[str, Any], ...] = ({},)) -> list[Any]:
    """Return a row for each variant: other columns, the class, settings."""
    return [
        pytest.param(
            *before,
            LoreftConfig,
            *({"rank": 4, "tied_weights": tied, **more} for more in settings),
            id="-".join([*before[:1], name]),
        )
        for name, tied in VARIANTS.items()
    ]


def _task(task_type: str) -> list[Any]:
    return _rows(settings=({"task_type": task_type},))


def _pairs(first: dict[str, Any], second: dict[str, Any], name: str) -> list[Any]:
    """Return a row of two configs for each variant."""
    return [
        pytest.param(
            name,
            LoreftConfig(rank=4, tied_weights=tied, **first),
            LoreftConfig(rank=4, tied_weights=tied, **second),
            id=f"{name}-{variant}",
        )
        for variant, tied in VARIANTS.items()
    ]


# File, and the lists in it. Other parametrisations of these files, and PEFT's other
# files, are about a method of its own, image models, or need a GPU.
REPLACED: dict[str, dict[str, list[Any]]] = {
    "test_decoder_models": {
        "ALL_CONFIGS": _task("CAUSAL_LM"),
        "PEFT_DECODER_MODELS_TO_TEST": [name for name, _, _ in DECODERS],
    },
    "test_feature_extraction_models": {"ALL_CONFIGS": _task("FEATURE_EXTRACTION")},
    "test_seq_classifier": {"ALL_CONFIGS": _task("SEQ_CLS")},
    "test_token_classification_qa": {  # Since PEFT 0.21.
        "TOKEN_CLS_CONFIGS": _task("TOKEN_CLS"),
        "QA_CONFIGS": _task("QUESTION_ANS"),
    },
    "test_custom_models": {
        "TEST_CASES": _rows("LoReFT", "Llama"),
        "ALL_PEFT_CONFIG_CLASSES": [LoreftConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [
            *_rows("same layers", "loreft", settings=({}, {})),
            *_rows("other layers", "loreft", settings=({"layers": 0}, {"layers": 1})),
        ],
        "MIXED_ADAPTER_TEST_CASES": [
            *_pairs({}, {"positions": "l1"}, "same layers"),
            *_pairs({"layers": 0}, {"layers": 1}, "other layers"),
        ],
    },
    "test_config": {"ALL_CONFIG_CLASSES": _rows()},
}
