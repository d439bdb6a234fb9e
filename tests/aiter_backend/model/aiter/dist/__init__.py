"""AITER's collectives."""
