"""Drafting without training, from the text itself or from the target's earlier predictions."""
