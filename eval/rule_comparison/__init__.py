"""Trials, contexts and tables of `python -m eval.rules`."""
