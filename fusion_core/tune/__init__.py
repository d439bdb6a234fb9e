"""Measures strategies and builds tables from the times."""
