"""The metric `exact_match_number`: load it with `evaluate.load` and this folder's path."""
