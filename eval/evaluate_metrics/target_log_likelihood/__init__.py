"""The metric `target_log_likelihood`: load it with `evaluate.load` and this folder's path."""
