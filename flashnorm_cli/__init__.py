"""Fold RMSNorm gains into the linear layers that read them, and prove that the model stays the same."""

__version__ = "0.1.0"
