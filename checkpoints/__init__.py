"""Trained components outside of this repository: folders, formats, cards, provenance."""
