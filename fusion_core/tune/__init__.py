"""Measures strategies, and makes tables."""
