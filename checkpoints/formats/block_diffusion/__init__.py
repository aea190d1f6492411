"""Formats of drafters that fill in blocks (DFlash and DSpark)."""
