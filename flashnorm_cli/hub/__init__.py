"""Folded checkpoints on the Hugging Face Hub: what is published, the model card, and the way there."""
