"""Memory that the ranks of a group share."""
