"""Drafters, which propose tokens: one folder per family, one file per method."""
