"""Drafters that fill in a whole block in one pass over the target's states (DFlash and kin)."""
