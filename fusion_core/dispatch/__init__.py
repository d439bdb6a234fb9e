"""Operators that pick a strategy when they run."""
