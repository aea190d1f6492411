"""Figures of one row, with intervals."""
