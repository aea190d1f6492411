"""Answers of the target: what is asked, kept and counted."""
