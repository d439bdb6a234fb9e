"""Helpers of `aiter.jit`."""
