"""Low-rank kernels, matmuls and attention: one specification, several implementations."""
