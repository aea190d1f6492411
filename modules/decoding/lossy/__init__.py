"""Decoders that change what is written: other criteria than the likeliest next token."""
