"""Drafting without training: from the text itself, or from what the target predicted before."""
