"""Trained prompt tokens that a frozen target reads beside its text."""
