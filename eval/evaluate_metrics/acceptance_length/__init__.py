"""The metric `acceptance_length`: load it with `evaluate.load` and this folder's path."""
