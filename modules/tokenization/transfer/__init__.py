"""Embeddings for the tokens of other tokenizers, and for tokens that are merged for a batch."""
