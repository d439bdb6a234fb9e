"""Matching of patterns against a lifted graph: a match, or the nearest miss."""
