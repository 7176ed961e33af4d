"""PEFT's own generic tests, run with LoReFT (docs/peft-suite.md)."""
