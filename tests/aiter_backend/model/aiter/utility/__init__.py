"""AITER's helpers."""
