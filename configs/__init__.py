"""Recipes, one YAML each, and what reads them."""
