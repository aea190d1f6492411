"""Trained prompt tokens that a frozen target reads together with its text."""
