"""Texts with a label per token, for judges."""
