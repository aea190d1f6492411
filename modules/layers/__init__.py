"""Layers that drafters are made of."""
