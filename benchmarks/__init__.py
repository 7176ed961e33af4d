"""LoReFT measured beside what else could be used; ``python -m benchmarks`` runs it.

Every ratio is paired: the contestants take turns within one run, and every repetition
is in the JSON. What runs in other environments needs torch and transformers alone.
"""
