"""Rows that run in vLLM."""
