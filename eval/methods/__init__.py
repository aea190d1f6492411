"""Rows of an evaluation: drafters with builders and rules, and the baselines."""
