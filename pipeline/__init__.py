"""Staged quantization of Hugging Face checkpoints to files that stock edge runtimes load."""

__version__ = "0.1.0"
