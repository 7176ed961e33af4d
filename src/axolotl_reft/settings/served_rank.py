"""Ranks that vLLM may be started with."""

# LoRAConfig.max_lora_rank of vLLM 0.32.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def max_lora_rank(rank: int) -> int:
    """Return the smallest value of --max-lora-rank for adapters of this rank; vLLM has
    none above 512, and refuses the rank itself."""
    return next((allowed for allowed in _RANKS if allowed >= rank), rank)
