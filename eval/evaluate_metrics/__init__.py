"""Metrics of this project as Hugging Face `evaluate` modules, one folder each."""
