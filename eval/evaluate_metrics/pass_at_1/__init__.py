"""The metric `pass_at_1`: load it with `evaluate.load` and this folder's path."""
