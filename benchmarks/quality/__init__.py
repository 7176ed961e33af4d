"""Accuracy of adapters on a real pretrained model: ``python -m benchmarks quality``."""
