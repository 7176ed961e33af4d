"""LoReFT served by vLLM: latency and memory; ``python -m benchmarks.serving``.

Runs in vLLM's environment. Several engines take turns in one process.
"""
