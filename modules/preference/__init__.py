"""Preference training at the level of tokens: of the target through adapters, and of drafters."""
