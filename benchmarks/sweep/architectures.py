"""The architectures of the installed transformers that take text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

# By kind, in the order of the table: the first that names a class counts.
_MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "multimodal": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "encoder": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
}


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers with a config class.

    Attributes:
        kind: causal, multimodal, masked, or encoder (a base model without a head).
        model_class: the name of the class.
        model_type: of its config, a key of ``AutoConfig``'s mapping.
    """

    kind: str
    model_class: str
    model_type: str

    @property
    def name(self) -> str:
        return self.model_class


def architectures() -> list[Architecture]:
    """Return one for each model class, sorted by kind and name."""
    found: dict[str, Architecture] = {}
    for kind, model_type, model_class in _entries():
        found.setdefault(model_class, Architecture(kind, model_class, model_type))
    order = list(_MAPPINGS)
    return sorted(found.values(), key=lambda a: (order.index(a.kind), a.model_class))


def _entries() -> Iterator[tuple[str, str, str]]:
    multimodal = set(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values())
    for kind, mapping in _MAPPINGS.items():
        for model_type, model_class in getattr(modeling_auto, mapping).items():
            listed = kind != "causal" or model_class not in multimodal
            if listed and hasattr(transformers, model_class):
                yield kind, model_type, model_class


def config_class(architecture: Architecture) -> type:
    """Return the config class that the model class names, or else its model type's."""
    model_class = getattr(transformers, architecture.model_class)
    named = getattr(model_class, "config_class", None)
    if named is not None:
        return named
    return getattr(transformers, CONFIG_MAPPING_NAMES[architecture.model_type])
