"""Verify: is a folded checkpoint the same model as its source? One module per level; `verify.py` runs them."""
