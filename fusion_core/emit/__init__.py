"""Inserts the chosen strategy into the graph and removes the nodes of the site."""
