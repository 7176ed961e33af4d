"""A byte-level tokenizer with the special tokens of several chat templates."""

from axolotl.utils.chat_templates import get_chat_template
from chat_templates import build_byte_tokenizer
from transformers import PreTrainedTokenizerFast

# What ends an answer.
EOS = {
    "llama3": "<|eot_id|>",
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "mistral_v1": "</s>",
}
SPECIALS = (
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>",
    "<|user|>", "<|assistant|>",
)  # fmt: skip

# Questions and answers by turns; a question of one letter, an answer of one.
CONVERSATIONS = (
    ("how do you do?", "fine", "and you?", "me too", "why", "because"),
    ("hi", "a"),
    ("one, two", "three, four", "5", "6"),
)


def build_chat_tokenizer(
    template: str, without: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """For a template, ``without`` some special tokens, which are spelled then."""
    specials = [token for token in SPECIALS if token not in without]
    end = "</s>" if EOS[template] in without else EOS[template]
    return build_byte_tokenizer(specials, end, get_chat_template(template))
