"""The metric `greedy_agreement`: load it with `evaluate.load` and this folder's path."""
