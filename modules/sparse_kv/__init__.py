"""Attention that reads a part of the target's KV cache."""
