"""Where AITER compiles its kernels."""
