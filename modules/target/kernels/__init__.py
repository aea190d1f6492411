"""How the layers are run: CPU kernels for few rows, compiled calls."""
