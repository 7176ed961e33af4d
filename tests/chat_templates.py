"""The chat templates that axolotl and TRL ship, each with a tokenizer of its own."""

import re
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FOLDERS = {
    "axolotl": "utils/chat_templates/templates",
    "trl": "chat_templates",
}
_SPECIAL = re.compile(
    r"<[|｜/a-zA-Z_][^<>\s'\"{}]*>"  # noqa: RUF001
    r"|\[/?[A-Z_]{3,}\]|\[\|[a-z]+\|\]"
)


def template_files() -> dict[str, Path]:
    """Return the templates of the packages that are installed, by package/name."""
    files = {}
    for package, folder in FOLDERS.items():
        spec = find_spec(package)
        for path in sorted(Path(p) for p in (spec.submodule_search_locations or ())):
            for file in sorted((path / folder).glob("*.jinja")):
                files[f"{package}/{file.stem}"] = file
    return files


def build_byte_tokenizer(
    specials: list[str], eos_token: str, chat_template: str
) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=eos_token,
        chat_template=chat_template,
    )


def build_tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer with every special token that a template writes."""
    found = set(_SPECIAL.findall(template)) | {"<｜end▁of▁sentence｜>"}  # noqa: RUF001
    specials = ["<pad>", "<s>", "</s>", *sorted(found - {"<pad>", "<s>", "</s>"})]
    return build_byte_tokenizer(specials, "</s>", template)
