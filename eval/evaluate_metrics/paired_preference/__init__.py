"""The metric `paired_preference`: load it with `evaluate.load` and this folder's path."""
