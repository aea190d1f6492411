"""Learned verification: what decides, beside the target's law, whether a drafted token may stay."""
