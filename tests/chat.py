"""A byte-level tokenizer with the special tokens of several chat templates."""

from axolotl.utils.chat_templates import get_chat_template
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
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
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token) for token in specials])
    end = EOS[template]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>" if end in without else end,
        chat_template=get_chat_template(template),
    )
