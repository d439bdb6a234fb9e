"""The chosen strategy in, the nodes of the site out."""
