"""Drafters of several tokens per pass."""
