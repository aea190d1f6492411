"""Kernels: CPU kernels for few rows, and compiled calls."""
