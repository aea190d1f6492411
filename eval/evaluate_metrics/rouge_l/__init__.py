"""The metric `rouge_l`: load it with `evaluate.load` and this folder's path."""
