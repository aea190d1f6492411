"""Running all rows interleaved; journals; several processes."""
