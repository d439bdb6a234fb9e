"""AITER's communicators."""
