"""Pretrained models and data that ship in packages: ``python -m examples.real``."""
