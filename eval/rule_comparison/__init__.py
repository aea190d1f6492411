"""What `python -m eval.rules` compares, on which contexts, and how it is written."""
