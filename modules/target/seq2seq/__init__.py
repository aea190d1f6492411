"""Encoder-decoder targets (T5, BART), with the sessions of any other target."""
