"""Lifting: a view of what a graph computes, in the neutral vocabulary."""
