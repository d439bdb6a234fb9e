"""Where a pattern matches a lifted graph, or the nearest miss."""
