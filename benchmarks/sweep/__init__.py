"""Every architecture of the installed transformers, small, against a plain reference;
``python -m benchmarks.sweep`` runs it and writes ``docs/architectures.md``.
"""
