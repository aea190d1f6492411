"""Prompts, and how answers are checked."""
