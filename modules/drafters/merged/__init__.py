"""Merged tokens as drafts: units of several base tokens, drafted at once."""
