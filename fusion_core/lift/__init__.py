"""Lifting: what a graph computes, in the neutral vocabulary, as a view beside the graph."""
