"""Drafters whose guesses come from the target's own pass, of rows that only compute."""
