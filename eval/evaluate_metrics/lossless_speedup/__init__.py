"""The metric `lossless_speedup`: load it with `evaluate.load` and this folder's path."""
