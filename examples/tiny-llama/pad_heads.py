"""Write the demo's base once more, computing the same, with heads that vLLM takes.

vLLM's attention on CPUs takes heads of 32 numbers, and those of the base have 26. Six
zeros are added to each. Rotary positions turn number i of a head together with number
i + size/2, by angles of base^(−2i/size), so each half is padded by itself, and the base
is chosen anew, so that the angles stay. Attention divides by √size, which the queries
make good.

Run from the repository root, after make_base.py: `python
examples/tiny-llama/pad_heads.py`. It takes seconds and writes `served/base`.
"""

import torch
from task import BASE_DIR, SERVED_DIR
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

HEAD_SIZE = 32


def with_padded_heads(model: LlamaForCausalLM, head_size: int) -> LlamaForCausalLM:
    """The same function of the input, with larger heads."""
    config = model.config
    heads, old_size = config.num_attention_heads, config.head_dim
    assert config.num_key_value_heads == heads

    def padded(weight: Tensor) -> Tensor:
        """Output rows of all heads, with zeros after each half of a head."""
        halves = weight.unflatten(0, (heads, 2, old_size // 2))
        added = (head_size - old_size) // 2
        return nn.functional.pad(halves, (0, 0, 0, added)).flatten(0, 2)

    weights = model.state_dict()
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weights[name] = padded(weight)
        elif name.endswith("o_proj.weight"):
            weights[name] = padded(weight.T).T
        if name.endswith("q_proj.weight"):
            weights[name] *= (head_size / old_size) ** 0.5
    rope = dict(config.rope_parameters)
    rope["rope_theta"] **= head_size / old_size
    settings = config.to_dict() | {"head_dim": head_size, "rope_parameters": rope}
    result = type(model)(type(config)(**settings))
    result.load_state_dict(weights)
    return result.eval()


@torch.no_grad()
def main() -> None:
    """Write the padded base beside its tokenizer."""
    base = AutoModelForCausalLM.from_pretrained(BASE_DIR)
    with_padded_heads(base, HEAD_SIZE).save_pretrained(SERVED_DIR)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(SERVED_DIR)


if __name__ == "__main__":
    main()
