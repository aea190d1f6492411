"""Texts that are made here."""
